"""Load: check all, then read into the live model and optimizer, whatever shards them.

Then prove the rates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load

from dist_layerlr import ranks
from dist_layerlr.checkpoint import folders
from dist_layerlr.checkpoint.dcp import LoadPlanner, Run, accept_one_process
from dist_layerlr.checkpoint.deepspeed import restore_engine
from dist_layerlr.checkpoint.live import (
    Live,
    look,
    rng_target,
    same_values,
    sample_runs,
    weight_targets,
)
from dist_layerlr.checkpoint.manifest import (
    Manifest,
    model_problem,
    plan_problem,
    read_manifest,
    read_sealed,
)
from dist_layerlr.checkpoint.optim_state import OwnerState, plan_state, prepare_state, without_state
from dist_layerlr.checkpoint.rng import fork_rng, write_rng
from dist_layerlr.checkpoint.save import settle, worded
from dist_layerlr.checkpoint.storage import INDEX, Index, ShardReader, broken, read_index
from dist_layerlr.errors import CheckpointError
from dist_layerlr.optim.schedule import PlanSchedule
from dist_layerlr.optim.validate import torch_scheduler
from dist_layerlr.plan.diff import PLAN_FILE, plan_diff
from dist_layerlr.plan.entries import Plan
from dist_layerlr.proof.reapply import reapply
from dist_layerlr.proof.verify import Proof, verify
from dist_layerlr.ranks import alike, everyone, rank_zero


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
        CheckpointError: on all ranks alike; the running job is untouched.
        PlanMismatch: the live rates differ from the plan after the load.
    """
    settle()
    path = find_checkpoint(folder)
    extra = extra or {}
    rank = ranks.rank()
    checked = alike(lambda: _check(path, plan, model, optimizer, extra, rank))
    manifest, index, live, states = checked.manifest, checked.index, checked.live, checked.states
    forgotten = [key for key in manifest.objects if key not in extra]
    if forgotten and rank == 0:
        warnings.warn(
            f"The saved state of extra[{forgotten[0]!r}] was not asked for: it starts anew.",
            stacklevel=2,
        )
    _check_samples(path, manifest, index, live)
    given = {key: target for key, target in extra.items() if hasattr(target, "load_state_dict")}
    _restore_extra(given, manifest.extra)
    random = rng_target(manifest, index, rank)
    _fill_all(
        path,
        index,
        [random, *weight_targets(live, manifest), *prepare_state(states, live, manifest)],
    )
    live.sharder.refresh(optimizer)
    multiplier = _multiplier(given.values(), manifest) if factor is None else factor
    reapply(checked.plan, model, optimizer, factor=multiplier)
    for scheduler in filter(None, map(torch_scheduler, given.values())):
        _rebase(scheduler)
    restore_engine(model, manifest.sharder_state)
    _restore_rng(random.tensor, manifest.ranks, rank)
    proof = verify(checked.plan, model, optimizer, factor=multiplier)
    return Restored(
        path=path,
        step=manifest.step,
        extra=manifest.extra,
        plan=checked.plan,
        changes=checked.changes,
        fresh=list(dict.fromkeys(chain(*everyone(without_state(states))))),
        proof=proof,
    )


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that ``folder`` is, or the newest complete one in it; rank 0's choice.

    Collective.

    Raises:
        CheckpointError: there is none, or a rank does not see it.
    """
    chosen = rank_zero(lambda: folders.latest(folder))
    return alike(lambda: folders.latest(chosen))


def resume_plan(folder: str | Path, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan to train with after a resume, and how ``plan`` differs from the checkpoint's.

    Collective.

    Call it before ``attach``. Under ``resume_lr: plan`` it is the plan itself; under
    ``checkpoint``, names that the checkpoint knows keep its rates and weight decay.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, or one of another model.
    """
    path = find_checkpoint(folder)

    def adapt() -> tuple[Plan, list[str]]:
        manifest = read_manifest(path)
        problem = plan_problem(
            manifest, {name: entry.shape for name, entry in plan.entries.items()}
        )
        _refuse_other_model(path, problem)
        return _adapted(path, manifest, plan)

    return alike(adapt)


def _adapted(path: Path, manifest: Manifest, plan: Plan) -> tuple[Plan, list[str]]:
    rows: dict[str, Any] = read_sealed(path, PLAN_FILE, manifest)["parameters"]
    changes = plan_diff(rows, plan, called=("checkpoint's", "new"))
    if plan.config.per_layer_lr.resume_lr == "plan" or not changes:
        return plan, changes
    entries = {
        name: (
            replace(entry, lr=rows[name]["lr"], weight_decay=rows[name]["weight_decay"])
            if name in rows
            else entry
        )
        for name, entry in plan.entries.items()
    }
    return replace(plan, entries=entries), changes


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """A checkpoint that fits what is live, and whose bytes, of this rank's share, are good."""

    manifest: Manifest
    index: Index
    plan: Plan
    """To be put in force."""
    changes: list[str]
    live: Live
    states: list[OwnerState]


def _check(
    path: Path, plan: Plan, model: nn.Module, optimizer: Any, extra: Mapping[str, Any], rank: int
) -> _Checked:
    """All that can be said without other ranks and without changing anything."""
    manifest = read_manifest(path)
    absent = [key for key in extra if key not in manifest.extra]
    if absent:
        raise CheckpointError(
            f"extra[{absent[0]!r}] is not in checkpoint {str(path)!r}, which has"
            f" {sorted(manifest.extra)}. Leave it out to let it start anew."
        )
    index = read_index(read_sealed(path, INDEX, manifest))
    effective, changes = _adapted(path, manifest, plan)
    live = look(model, optimizer)
    _refuse_other_model(
        path, model_problem(manifest, {w.name: (tuple(w.shape), w.aliases) for w in live.weights})
    )
    states = plan_state(live, manifest, index)
    _check_bytes(path, index, rank)
    return _Checked(
        manifest=manifest, index=index, plan=effective, changes=changes, live=live, states=states
    )


def _refuse_other_model(path: Path, problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(f"Checkpoint {str(path)!r} is of another model: {problem}.")


def _check_bytes(path: Path, index: Index, rank: int) -> None:
    problems = broken(path, index, rank, ranks.world_size())
    if problems:
        more = f" ({len(problems) - 1} more on this rank)" if len(problems) > 1 else ""
        raise CheckpointError(problems[0] + more)


def _check_samples(path: Path, manifest: Manifest, index: Index, live: Live) -> None:
    """Compare the frozen base with the saved samples."""
    if all(row.saved for row in manifest.parameters.values()):
        return
    pairs = sample_runs(live, manifest)
    _fill(path, index, [room for _, room in pairs])

    def compare() -> None:
        for mine, saved in pairs:
            name = saved.key.partition(".")[2]
            if not same_values(
                mine.tensor.cpu(), saved.tensor, getattr(torch, manifest.parameters[name].dtype)
            ):
                raise CheckpointError(
                    f"Checkpoint {str(path)!r} was trained on another base model: frozen {name} has"
                    " other values. Load the base that it was trained on (model_path)."
                )

    alike(compare)


def _fill_all(path: Path, index: Index, runs: list[Run]) -> None:
    try:
        _fill(path, index, runs)
    except CheckpointError as error:  # of the disk: the bytes were good a moment ago
        raise CheckpointError(
            f"{error} A part is loaded already: end this job, its weights are neither the old nor"
            " the saved ones."
        ) from error


def _fill(path: Path, index: Index, runs: list[Run]) -> None:
    accept_one_process()
    with worded(), torch.no_grad():
        load({}, storage_reader=ShardReader(path, index), planner=LoadPlanner(runs))
        for run in runs:
            run.settle()


def _restore_extra(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Before anything else is changed: the caller's objects may refuse.

    On any rank, then all get their own state back.
    """
    before = {
        key: deepcopy(target.state_dict())
        for key, target in given.items()
        if hasattr(target, "state_dict")
    }

    def restore() -> None:
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
    except CheckpointError:
        for key, state in before.items():
            with suppress(Exception):  # one that never had a state to give back
                given[key].load_state_dict(state)
        raise


def _multiplier(given: Iterable[Any], manifest: Manifest) -> float:
    """The caller's own schedule may be another one by now.

    Without one, the saved multiplier stays in force.
    """
    return next((s.factor for s in given if isinstance(s, PlanSchedule)), manifest.factor)


def _rebase(scheduler: Any) -> None:
    """A torch scheduler, and those inside it, bring the old plan's rates back, in the old plan's
    order of groups.
    """
    for inner in getattr(scheduler, "_schedulers", ()):
        _rebase(inner)
    groups = scheduler.optimizer.param_groups
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
    scheduler._last_lr = [
        group["lr"] for group in groups
    ]  # what get_last_lr() reports until the next step


def _restore_rng(saved: torch.Tensor, ranks: int, rank: int) -> None:
    if rank < ranks:
        write_rng(saved)
    else:
        fork_rng(saved, rank)
