"""How a run continues from a checkpoint, and how it writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.checkpoint import (
    CHECKPOINTS,
    Saving,
    complete_checkpoints,
    find_checkpoint,
    finish_background_save,
    read_manifest,
    resume_plan,
    step_of,
)
from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.export import SAVED_CONFIG, adapter_config
from dist_layerlr.plan import Plan
from dist_layerlr.ranks import alike, any_rank, rank_zero
from launch.trainer.adapters import ADAPTER
from launch.trainer.ema import in_checkpoint
from launch.trainer.job import Job
from launch.trainer.outputs import check_fresh
from launch.trainer.runtime import Runtime
from launch.trainer.state import Position
from launch.trainer.steering import Kept, Steering, kept_of
from launch.trainer.team import Team, own, under

LATEST = "latest"
_RUN = "run"
"""Key of ``Job.run_id`` in a checkpoint's extra."""
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""What of an adapter's config decides how its weights are read."""


def choose_checkpoint(resume: str | None, folder: Path, runtime: Runtime) -> Path | None:
    """Return the checkpoint to continue from; None: a run from the beginning. Collective.

    ``latest`` without any checkpoint is a beginning too, so that one command line starts a job and
    restarts it.

    Raises:
        ConfigError: checkpoints of another run in the output folder, and no --resume, or one from
            elsewhere.
        CheckpointError: no checkpoint at the given path.
    """
    if resume is None:
        alike(lambda: check_fresh(folder))
        return None
    # Any rank: on a network disk some see a checkpoint later than others. find_checkpoint below
    # then fails on those, on all ranks together.
    if resume == LATEST and not any_rank(bool(complete_checkpoints(folder / CHECKPOINTS))):
        runtime.say(f"no checkpoint in {folder / CHECKPOINTS} yet: starting at step 0")
        return None
    path = find_checkpoint(folder / CHECKPOINTS if resume == LATEST else resume)
    if not is_own(path, folder):
        alike(lambda: check_fresh(folder))
    return path


def choose_checkpoints(
    resume: str | None, folder: Path, runtime: Runtime, names: Collection[str]
) -> dict[str, Path]:
    """Return the checkpoint of each network to continue from; none: from the beginning. Collective.

    Args:
        resume: As ``choose_checkpoint`` takes it. For several networks a path is that of a run's
            output folder.
        folder: Output folder of the run.
        runtime: This rank.
        names: Of the networks.

    Raises:
        ConfigError: see ``choose_checkpoint``.
        CheckpointError: no step of which every network has a checkpoint.
    """
    if len(names) == 1:
        found = choose_checkpoint(resume, folder, runtime)
        return {} if found is None else dict.fromkeys(names, found)
    root = folder if resume in (None, LATEST) else Path(str(resume))
    if root.resolve() != folder.resolve() or resume is None:
        for name in names:
            alike(partial(check_fresh, folder / name))
    if resume is None:
        return {}
    # One rank looks, so that all take the same: a disk may show files late.
    common = rank_zero(lambda: _newest_common(root, names))
    if not common and resume == LATEST:
        runtime.say(f"no step has a checkpoint of every network in {root}: starting at step 0")
    elif not common:
        raise CheckpointError(
            f"Invalid --resume {str(root)!r}: no step has a checkpoint of each of"
            f" {', '.join(names)} there. Give the output folder of a run of both experts."
        )
    return {name: Path(path) for name, path in common.items()}


def _newest_common(root: Path, names: Collection[str]) -> dict[str, str]:
    """The checkpoints of the newest step that every network has; empty without one."""
    by_step: dict[int, dict[str, str]] = {}
    for name in names:
        # The later of two of one step comes last, and stays.
        for path in complete_checkpoints(root / name / CHECKPOINTS):
            by_step.setdefault(step_of(path), {})[name] = str(path)
    steps = [step for step, found in by_step.items() if len(found) == len(names)]
    return by_step[max(steps)] if steps else {}


def is_own(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is of the run in this output folder, whose files then go on."""
    # Resolved, because the user may name the folder by a link or a relative path.
    return checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


@dataclass(frozen=True, kw_only=True)
class Past:
    """What a checkpoint says of the run that wrote it."""

    step: int
    """Optimizer steps done."""
    run_id: str | None
    """``Job.run_id`` of the start that did the last of them; None: written before there were any,
    or by another program."""
    samples: int = 0
    """Samples seen."""
    kept: Sequence[Kept] = ()
    """What had been changed while it ran."""


def look_back(path: Path) -> Past:
    """Read what a checkpoint says of its run. Collective."""

    def read() -> Past:
        manifest = read_manifest(path)
        run_id = manifest.extra.get(_RUN)
        return Past(
            step=manifest.step,
            run_id=run_id if isinstance(run_id, str) else None,
            samples=manifest.extra.get("samples", 0),
            kept=kept_of(manifest.extra),
        )

    return rank_zero(read)


def adapt_plan(path: Path, plan: Plan, runtime: Runtime, *, trained: bool) -> Plan:
    """Return the plan to train with, by ``resume_lr``; say what differs from the checkpoint's.

    Args:
        path: Of the checkpoint.
        plan: Of the config.
        runtime: This rank.
        trained: No step is left to do: the plan is the one that was trained, whatever the config
            says by now.
    """
    if trained:
        block = replace(plan.config.per_layer_lr, resume_lr="checkpoint")
        plan = replace(plan, config=replace(plan.config, per_layer_lr=block))
    adapted, changes = resume_plan(path, plan)
    kept = plan.config.per_layer_lr.resume_lr == "checkpoint"
    if changes:
        why = "no step is left to train at others" if trained else "resume_lr"
        runtime.say(
            f"the plan differs from the checkpoint's; {'its' if kept else 'the new'} rates apply"
            f" ({why}):"
        )
    for line in changes:
        runtime.say(f"  {line}")
    return adapted


def restore(job: Job, path: Path) -> Position:
    """Load the checkpoint. Returns where to go on. Collective.

    Raises:
        CheckpointError: it is not of this program.
        ConfigError: the run is already longer than ``train.steps`` asks. At just that many steps
            only the weights, samples and proofs are left to write: the run was ended between its
            last checkpoint and these. Then another adapter than the trained one is refused too.
    """
    options, runtime = job.options, job.runtime
    with in_checkpoint(job):
        restored = job.engine.load(path)
    extra = restored.extra
    if not extra.keys() >= {"samples", "observed"}:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} does not say how many samples were seen: train.py did not"
            " write it. Start from its weights: dist-layerlr export, then model_path."
        )
    if restored.step > options.train.steps:
        allowed = f"at least {restored.step}, the steps done in {str(path)!r}"
        raise fields.invalid("train.steps", options.train.steps, allowed)
    if restored.step == options.train.steps:
        _check_trained_adapter(job, path, extra.get(SAVED_CONFIG))
    for line in _changed(extra.get("config", {}), options.raw):
        runtime.say(f"  config: {line}")
    runtime.say(f"resumed {path} after {restored.step} steps")
    return Position(
        step=restored.step,
        samples=extra["samples"],
        observed=extra["observed"],
        validation=extra.get("validation", {}),
    )


def _check_trained_adapter(job: Job, path: Path, saved: Any) -> None:
    """Refuse to write trained weights beside the settings of an adapter that was not trained."""
    live = adapter_config(job.engine.model, ADAPTER)
    if saved is None or live is None:
        return
    for key in _SCALING:
        if saved.get(key) != live.get(key):
            raise ConfigError(
                f"Invalid adapter: {key}={live.get(key)!r}, but {str(path)!r} was trained with"
                f" {saved.get(key)!r}, and no step is left to train. Set it back, or raise"
                " train.steps."
            )


class Saver:
    """Writes checkpoints, and says which ones are on disk."""

    def __init__(self, job: Job, steering: Steering):
        self._job, self._steering = job, steering
        # The adapter's config lets dist-layerlr export a checkpoint without building the model.
        config = adapter_config(job.engine.model, ADAPTER)
        self._adapter = {} if config is None else {SAVED_CONFIG: config}
        self._pending: tuple[Saving, int] | None = None

    def __call__(
        self, step: int, samples: int, observed: Mapping[str, float], validation: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, or begin to. Collective."""
        # Before the next one, because two share neither memory nor disk well.
        self.finish()
        job = self._job
        extra = {
            "samples": samples,
            "observed": dict(observed),
            "validation": dict(validation),
            "config": dict(job.options.raw),
            _RUN: job.run_id,
            **self._steering.saved(),
            **self._adapter,
        }
        train = job.options.train
        if job.network and train.keep is not None:
            # A run that is killed between two networks' checkpoints goes on from the step before.
            train = replace(train, keep=train.keep + 1)
        with in_checkpoint(job):
            saving = job.engine.save(job.folder / CHECKPOINTS, step, extra, train)
        self._pending = (saving, step)
        if not job.options.train.background_save:
            self.finish()

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written, and say where it is. Collective."""
        finish_background_save()
        pending, self._pending = self._pending, None
        if pending is not None:
            saving, step = pending
            self._job.runtime.say(f"saved checkpoint {saving.path} after {step} steps")


class Savers:
    """Writes the checkpoints of all networks of a run, one after the other."""

    def __init__(self, team: Team):
        self._team = team
        self._savers = {name: Saver(job, team.steering) for name, job in team.jobs.items()}

    def __call__(
        self, step: int, samples: int, observed: Mapping[str, float], validation: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint of each network, or begin to. Collective."""
        for name, _ in self._team.each():
            self._savers[name](step, samples, own(name, observed), validation)

    def finish(self) -> None:
        """Wait for those that are still being written. Collective."""
        for saver in self._savers.values():
            saver.finish()


def restore_all(team: Team, paths: Mapping[str, Path]) -> Position:
    """Load the checkpoint of each network. Returns where to go on. Collective.

    Raises:
        CheckpointError, ConfigError: see ``restore``.
    """
    begin, observed = Position(), dict[str, float]()
    for name, job in team.each():
        if name in paths:
            begin = restore(job, paths[name])
            observed |= under(name, begin.observed)
    return replace(begin, observed=observed)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield readable lines: ``train.seed: 0 -> 1``. Rates have lines of their own."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and key.partition(".")[0] != "per_layer_lr":
            yield f"{key}: {before.get(key, 'default')} -> {after.get(key, 'default')}"


def _leaves(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
