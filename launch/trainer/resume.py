"""How a run continues from a checkpoint, and how it writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.checkpoint import find_checkpoint, finish_background_save, resume_plan
from dist_layerlr.checkpoint.folders import CHECKPOINTS, complete
from dist_layerlr.errors import CheckpointError
from dist_layerlr.export.export import SAVED_CONFIG, adapter_config
from dist_layerlr.plan.entries import Plan
from launch.trainer.engines.base import Engine
from launch.trainer.loop import Position, Save
from launch.trainer.options import RunOptions
from launch.trainer.outputs import check_fresh
from launch.trainer.runtime import Runtime
from launch.trainer.weights import ADAPTER

LATEST = "latest"
Say = Callable[..., None]


def choose_checkpoint(resume: str | None, folder: Path, runtime: Runtime, say: Say) -> Path | None:
    """The checkpoint to continue from; None: a run from the beginning.

    ``latest`` without any checkpoint is a beginning too, so that one command line starts a job and
    restarts it.

    Raises:
        ConfigError: checkpoints of another run in the output folder, and no --resume, or one from
            elsewhere.
        CheckpointError: no checkpoint at the given path.
    """
    if resume is None:
        runtime.agree(lambda: check_fresh(folder))
        return None
    if resume == LATEST and not any(runtime.everyone(bool(complete(folder / CHECKPOINTS)))):
        say(f"no checkpoint in {folder / CHECKPOINTS} yet: starting at step 0")
        return None
    path = find_checkpoint(folder / CHECKPOINTS if resume == LATEST else resume)
    if not is_own(path, folder):
        runtime.agree(lambda: check_fresh(folder))
    return path


def is_own(checkpoint: Path, folder: Path) -> bool:
    """Whether a checkpoint is of the run in this output folder, whose files then go on."""
    return checkpoint.resolve().parent == (folder / CHECKPOINTS).resolve()


def adapt_plan(path: Path, plan: Plan, say: Say) -> Plan:
    """The plan to train with, by ``resume_lr``; says what differs from the checkpoint's."""
    adapted, changes = resume_plan(path, plan)
    kept = plan.config.per_layer_lr.resume_lr == "checkpoint"
    if changes:
        say(
            f"the plan differs from the checkpoint's; {'its' if kept else 'the new'} rates apply"
            " (resume_lr):"
        )
    for line in changes:
        say(f"  {line}")
    return adapted


def restore(engine: Engine, path: Path, options: RunOptions, say: Say) -> Position:
    """Load the checkpoint. Returns where to go on.

    Raises:
        CheckpointError: it is not of this program.
        ConfigError: the run is already longer than ``train.steps`` asks. At just that many steps
            only the weights, samples and proofs are left to write: the run was ended between its
            last checkpoint and these.
    """
    restored = engine.load(path)
    extra = restored.extra
    if not extra.keys() >= {"samples", "observed"}:
        raise CheckpointError(
            f"Checkpoint {str(path)!r} does not say how many samples were seen: train.py did not"
            " write it. Start from its weights: dist-layerlr export, then model_path."
        )
    if restored.step > options.train.steps:
        allowed = f"at least {restored.step}, the steps done in {str(path)!r}"
        raise fields.invalid("train.steps", options.train.steps, allowed)
    for line in _changed(extra.get("config", {}), options.raw):
        say(f"  config: {line}")
    say(f"resumed {path} after {restored.step} steps")
    return Position(step=restored.step, samples=extra["samples"], observed=extra["observed"])


def saver(engine: Engine, options: RunOptions, folder: Path) -> Save:
    """What the loop calls for a checkpoint."""
    config = adapter_config(engine.model, ADAPTER)
    adapter = {} if config is None else {SAVED_CONFIG: config}  # for dist-layerlr export

    def save(step: int, samples: int, observed: Mapping[str, float]) -> None:
        extra = {
            "samples": samples,
            "observed": dict(observed),
            "config": dict(options.raw),
            **adapter,
        }
        engine.save(folder / CHECKPOINTS, step, extra, options.train)

    return save


def finish_saving() -> None:
    """Wait for a checkpoint that is still being written."""
    finish_background_save()


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Readable lines: ``train.seed: 0 -> 1``. Rates have lines of their own."""
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
