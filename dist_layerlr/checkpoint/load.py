"""Load: check everything, read into the live model and optimizer, put the rates back, prove them.

Whatever one rank raises on the way, all ranks raise: every local step runs inside ``alike``, and
the collectives stand between them on lines of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

from dist_layerlr import ranks
from dist_layerlr.checkpoint.dcp import LoadPlanner, StoredSpan, accept_one_process
from dist_layerlr.checkpoint.deepspeed import check_engine_state, restore_engine
from dist_layerlr.checkpoint.index import Index, dtype_named, read_index
from dist_layerlr.checkpoint.live import (
    Live,
    look,
    rng_target,
    sample_spans,
    weight_targets,
)
from dist_layerlr.checkpoint.manifest import (
    Manifest,
    model_problem,
    read_manifest,
)
from dist_layerlr.checkpoint.optim_state import (
    OwnerState,
    plan_state,
    prepare_state,
    restarted,
    without_state,
)
from dist_layerlr.checkpoint.resume import (
    adapted,
    find_checkpoint,
    refuse_other_model,
    refuse_other_ranks,
)
from dist_layerlr.checkpoint.rng import fork_rng, write_rng
from dist_layerlr.checkpoint.samples import same_values
from dist_layerlr.checkpoint.save import finish_background_save, worded
from dist_layerlr.checkpoint.storage import ShardReader, broken
from dist_layerlr.errors import CheckpointError, LayerLRError
from dist_layerlr.optim.follow import Follower
from dist_layerlr.optim.schedule import PlanSchedule
from dist_layerlr.optim.schedulers import rebase as _rebase
from dist_layerlr.optim.schedulers import torch_scheduler
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.names import without_rank
from dist_layerlr.proof.reapply import reapply
from dist_layerlr.proof.verify import Proof, verify
from dist_layerlr.ranks import alike, everyone


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was loaded."""

    path: Path
    step: int
    """Optimizer steps done."""
    extra: Mapping[str, Any]
    """As it was saved."""
    plan: Plan
    """In force: the given one, or with the checkpoint's rates under ``resume_lr: checkpoint``."""
    changes: list[str]
    """How the given plan differs from the checkpoint's: names, old -> new."""
    fresh: list[str]
    """Names without saved optimizer state; they start with zero moments."""
    proof: Proof


def load_checkpoint(
    folder: str | Path,
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    extra: Mapping[str, Any] | None = None,
    factor: float | None = None,
) -> Restored:
    """Load a checkpoint of any sharder on any number of ranks into this one. Collective.

    Everything is checked before anything is changed: names and shapes, every byte's checksum, the
    frozen base. Then weights, masters, optimizer state, step counters, random number generators and
    ``extra`` are put back, the plan's rates are written over, and all is verified.

    Args:
        folder: a checkpoint, or a folder of checkpoints: then the newest complete one.
        plan: of the live model. See ``resume_plan`` for a plan that differs from the checkpoint's.
        model: as it is trained.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        extra: objects with ``load_state_dict`` by key, as given to ``save_checkpoint``.
        factor: schedule multiplier to put in force; None: that of a PlanSchedule in ``extra``, else
            the saved one.

    Raises:
        CheckpointError: on all ranks alike; the running job is untouched, or else the text says so.
        PlanMismatch: the live rates differ from the plan after the load.
    """
    # A checkpoint that is still being written may be the one that is asked for.
    finish_background_save()
    path = find_checkpoint(folder)
    extra = extra or {}
    # 1. Refuse what can be refused; nothing is changed up to the end of this step. The
    #    frozen base comes last, since reading its samples needs an index that was checked.
    job = alike(lambda: _check(path, plan, model, optimizer, extra))
    alike(lambda: _warn_of_forgotten(job.manifest, extra))
    _check_samples(job)
    # 2. The caller's objects, because they may still refuse, and then all can be put back.
    given = {key: target for key, target in extra.items() if hasattr(target, "load_state_dict")}
    _restore_extra(given, job.manifest.extra)
    # 3. Weights and optimizer state: from here on a failure leaves a mixture, and says so.
    with _no_way_back():
        random, spans = alike(lambda: _targets(job))
        _fill(job, [random, *spans])
        # Low-precision copies are made from the masters that have just been read.
        alike(lambda: job.live.sharder.refresh())
        # 4. The rates, after everything that may have brought old ones: scheduler, optimizer state.
        multiplier = alike(lambda: _multiplier(given.values(), job.manifest, factor))
        # ``reapply`` walks the live optimizer again, because an object of the caller may have put
        # new group dicts into it in step 2 (optimizer.load_state_dict does).
        at = _step(given.values(), job.manifest)
        alike(lambda: reapply(job.plan, model, optimizer, factor=multiplier, step=at))
        # 5. Last what the steps above could disturb: schedulers read the rates, and nothing must
        #    draw from the generators once they are back.
        fresh = alike(lambda: _finish(job, model, given.values(), random.tensor))
    # 6. The proof walks once more: it must see what is there, not what was meant to be.
    proof = verify(job.plan, model, optimizer, factor=multiplier)
    fresh_by_rank = everyone([without_rank(name) or name for name in fresh])
    return job.restored(list(dict.fromkeys(chain.from_iterable(fresh_by_rank))), proof)


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A checkpoint that fits what is live, and whose bytes, of this rank's share, are good."""

    path: Path
    manifest: Manifest
    index: Index
    plan: Plan
    """To be put in force."""
    changes: list[str]
    live: Live
    states: list[OwnerState]

    def restored(self, fresh: list[str], proof: Proof) -> Restored:
        """What to tell the caller after the load."""
        return Restored(
            path=self.path,
            step=self.manifest.step,
            extra=self.manifest.extra,
            plan=self.plan,
            changes=self.changes,
            fresh=fresh,
            proof=proof,
        )


def _check(
    path: Path, plan: Plan, model: nn.Module, optimizer: Any, extra: Mapping[str, Any]
) -> _Checked:
    """All that can be said without other ranks and without changing anything."""
    manifest = read_manifest(path)
    check_engine_state(path, manifest)
    absent = [key for key in extra if key not in manifest.extra]
    if absent:
        raise CheckpointError(
            f"extra[{absent[0]!r}] is not in checkpoint {str(path)!r}, which has"
            f" {sorted(manifest.extra)}. Leave it out to let it start anew."
        )
    index = read_index(path, manifest)
    effective, changes = adapted(path, manifest, plan)
    live = look(model, optimizer)
    refuse_other_ranks(path, manifest, live.distinct)
    shapes = {name: (tuple(w.shape), w.aliases) for name, w in live.of_all_ranks.items()}
    refuse_other_model(path, model_problem(manifest, shapes))
    states = plan_state(live, manifest, index)
    # The bytes come last: they take the longest, and every other refusal is better known at once.
    problems = broken(path, index, ranks.rank(), ranks.world_size())
    if problems:
        more = f" ({len(problems) - 1} more on this rank)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)
    return _Checked(
        path=path,
        manifest=manifest,
        index=index,
        plan=effective,
        changes=changes + restarted(live, manifest),
        live=live,
        states=states,
    )


def _warn_of_forgotten(manifest: Manifest, extra: Mapping[str, Any]) -> None:
    """Warn of saved objects that nobody asks for: they start anew. Rank 0 speaks.

    It runs inside an agreement, because a program may turn warnings into errors.
    """
    forgotten = [key for key in manifest.objects if key not in extra]
    if forgotten and ranks.rank() == 0:
        # Frame 6 is the caller of load_checkpoint: this one, a lambda and ``alike`` come first.
        warnings.warn(
            f"The saved state of extra[{forgotten[0]!r}] was not asked for: it starts anew.",
            stacklevel=6,
        )


def _check_samples(job: _Checked) -> None:
    """Compare the frozen base with the saved samples. Collective."""
    parameters = job.manifest.parameters
    # All ranks read the same manifest, hence all return here or none.
    if all(row.saved for row in parameters.values()):
        return
    pairs = alike(lambda: sample_spans(job.live, job.manifest))
    _fill(job, [room for _, room in pairs])

    def compare() -> None:
        for mine, saved in pairs:
            name = saved.name.partition(".")[2]
            dtype = dtype_named(name, parameters[name].dtype)
            if not same_values(mine.tensor.cpu(), saved.tensor, dtype):
                raise CheckpointError(
                    f"Checkpoint {str(job.path)!r} was trained on another base model: frozen {name}"
                    " has other values. Load the base that it was trained on (model_path)."
                )

    alike(compare)


@contextmanager
def _no_way_back() -> Iterator[None]:
    """Add to what is raised inside that the job must end."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} A part is loaded already: end this job, its weights are neither the old nor"
            " the saved ones."
        ) from error


def _targets(job: _Checked) -> tuple[StoredSpan, list[StoredSpan]]:
    """Room for the generators' states, and where everything else goes.

    Optimizer state that is missing is created.
    """
    spans = weight_targets(job.live, job.manifest)
    spans += prepare_state(job.states, job.live, job.manifest)
    return rng_target(job.manifest, job.index, ranks.rank()), spans


def _fill(job: _Checked, spans: list[StoredSpan]) -> None:
    """Read the saved elements of spans into their memory. Collective.

    Checksums were verified before, so an error here is one of the disk during this read itself.
    """
    accept_one_process()
    reader = ShardReader(job.path, job.index)
    with worded(), torch.no_grad():
        # DCP agrees on errors by itself: its plan and its reads fail on all ranks or on none.
        load({}, storage_reader=reader, planner=LoadPlanner(spans))
    alike(lambda: _write_home(spans))


@torch.no_grad()
def _write_home(spans: Iterable[StoredSpan]) -> None:
    for span in spans:
        span.write_home()


def _restore_extra(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Restore the caller's objects first, because their ``load_state_dict`` may raise. Collective.

    If it raises on any rank, every rank puts them back, so that a refused load changes nothing.
    """
    before: dict[str, Any] = {}

    def restore() -> None:
        for key, target in given.items():
            if hasattr(target, "state_dict"):
                before[key] = deepcopy(target.state_dict())
        for key, target in given.items():
            try:
                target.load_state_dict(saved[key])
            except Exception as error:
                raise CheckpointError(
                    f"extra[{key!r}] does not take its saved state: {type(error).__name__}: {error}"
                    " Leave it out to let it start anew."
                ) from error

    try:
        alike(restore)
    except LayerLRError:
        for key, state in before.items():
            # An object that refuses its own state as well is the caller's to mend; the first
            # error is the one to tell.
            with suppress(Exception):
                given[key].load_state_dict(state)
        raise


def _multiplier(given: Iterable[Any], manifest: Manifest, factor: float | None) -> float:
    """The schedule's multiplier to put in force: the argument, the live schedule's, the saved one.

    The caller's own schedule may be another one by now. Without one, the saved multiplier stays.
    """
    if factor is not None:
        return factor
    for schedule in given:
        if isinstance(schedule, (PlanSchedule, Follower)):
            return schedule.factor
    return manifest.factor


def _step(given: Iterable[Any], manifest: Manifest) -> int:
    """The optimizer step that comes next, for timings: the live schedule's, else the saved one."""
    for schedule in given:
        if isinstance(schedule, (PlanSchedule, Follower)):
            return schedule.last_step
    return manifest.step


def _finish(
    job: _Checked, model: nn.Module, given: Iterable[Any], random: torch.Tensor
) -> list[str]:
    """Schedulers, DeepSpeed's counters and the generators; returns names without saved state."""
    for target in given:
        scheduler = torch_scheduler(target)
        if scheduler is not None:
            _rebase(scheduler)
    restore_engine(model, job.manifest.sharder_state)
    _restore_rng(random, job.manifest.ranks, ranks.rank())
    return without_state(job.states)


def _restore_rng(saved: torch.Tensor, saved_ranks: int, rank: int) -> None:
    if rank < saved_ranks:
        write_rng(saved)
    else:
        fork_rng(saved, rank)
