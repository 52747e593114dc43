"""How a run continues from a checkpoint, and how it writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
)
from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.export import SAVED_CONFIG, adapter_config
from dist_layerlr.plan import Plan
from dist_layerlr.ranks import alike, any_rank, rank_zero
from launch.trainer.adapters import ADAPTER
from launch.trainer.job import Job
from launch.trainer.outputs import check_fresh
from launch.trainer.runtime import Runtime
from launch.trainer.state import Position

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


def look_back(path: Path) -> Past:
    """Read what a checkpoint says of its run. Collective."""

    def read() -> Past:
        manifest = read_manifest(path)
        run_id = manifest.extra.get(_RUN)
        return Past(step=manifest.step, run_id=run_id if isinstance(run_id, str) else None)

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
    return Position(step=restored.step, samples=extra["samples"], observed=extra["observed"])


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

    def __init__(self, job: Job):
        self._job = job
        # The adapter's config lets dist-layerlr export a checkpoint without building the model.
        config = adapter_config(job.engine.model, ADAPTER)
        self._adapter = {} if config is None else {SAVED_CONFIG: config}
        self._pending: tuple[Saving, int] | None = None

    def __call__(self, step: int, samples: int, observed: Mapping[str, float]) -> None:
        """Write a checkpoint, or begin to. Collective."""
        # Before the next one, because two share neither memory nor disk well.
        self.finish()
        job = self._job
        extra = {
            "samples": samples,
            "observed": dict(observed),
            "config": dict(job.options.raw),
            _RUN: job.run_id,
            **self._adapter,
        }
        saving = job.engine.save(job.folder / CHECKPOINTS, step, extra, job.options.train)
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
