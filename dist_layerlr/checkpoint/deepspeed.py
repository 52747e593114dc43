"""DeepSpeed engines: their counters and loss scale.

And their own checkpoints, guarded by our name manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_layerlr.checkpoint.manifest import damaged
from dist_layerlr.errors import CheckpointError
from dist_layerlr.files import write_text
from dist_layerlr.plan.entries import Plan
from dist_layerlr.proof.reapply import check_group_layout, group_layout, reapply
from dist_layerlr.ranks import alike, everyone

NAMES = "dist_layerlr_names.json"
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_state(model: Any) -> dict[str, Any]:
    """Counters and loss scale of a DeepSpeed engine; empty for other models."""
    if not hasattr(model, "zero_optimization_stage"):
        return {}
    scaler = _scaler(model)
    return {
        "counters": {name: getattr(model, name) for name in _COUNTERS},
        "scale": {name: getattr(scaler, name) for name in _SCALE if hasattr(scaler, name)},
    }


def restore_engine(model: Any, state: Mapping[str, Any]) -> None:
    """Inverse of ``engine_state``.

    A checkpoint of another sharder leaves the engine's own numbers.
    """
    if not hasattr(model, "zero_optimization_stage") or not state:
        return
    for name, value in state["counters"].items():
        setattr(model, name, value)
    scaler = _scaler(model)
    for name, value in state["scale"].items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def save_deepspeed(folder: str | Path, plan: Plan, engine: Any, *, tag: str, **more: Any) -> None:
    """``engine.save_checkpoint`` with a manifest of names beside it. Collective.

    Args:
        folder: DeepSpeed's ``save_dir``.
        plan: in force.
        engine: DeepSpeed's.
        tag: folder of this checkpoint.
        **more: further arguments of ``save_checkpoint``.
    """
    engine.save_checkpoint(str(folder), tag=tag, **more)
    ranks = everyone(group_layout(plan, engine))  # all have written by now

    def write() -> None:
        if engine.global_rank == 0:
            ranks[0]["files"] = _sizes(Path(folder) / tag)
            write_text(Path(folder) / tag / NAMES, json.dumps(ranks))

    alike(write)


def load_deepspeed(
    folder: str | Path, plan: Plan, engine: Any, *, tag: str, factor: float = 1.0, **more: Any
) -> Any:
    """``engine.load_checkpoint``, but only into the layout it was saved from, and with the plan's
    rates after it.

    DeepSpeed matches by position: other groups of the same size would be filled with each other's
    weights. Load ``save_checkpoint``'s own format into another layout.

    Args:
        folder: DeepSpeed's ``load_dir``.
        plan: in force.
        engine: DeepSpeed's.
        tag: folder of this checkpoint.
        factor: the schedule's multiplier at that step.
        **more: further arguments of ``load_checkpoint``.

    Returns:
        DeepSpeed's client state.

    Raises:
        CheckpointError: no manifest, another number of ranks, or a file that is missing or of
            another length.
        PlanMismatch: names, order or sizes differ from the saved; nothing is loaded.
    """
    path = Path(folder) / tag / NAMES
    saved = alike(lambda: _read_names(path, len(everyone(None)), engine.global_rank))
    check_group_layout(saved, plan, engine)
    alike(lambda: _check_files(path.parent, saved.get("files", {})))
    _, client = engine.load_checkpoint(str(folder), tag=tag, **more)
    reapply(plan, engine, factor=factor)
    return client


def _sizes(folder: Path) -> dict[str, int]:
    """{file: bytes} of what DeepSpeed has written, as one rank sees it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != NAMES)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _check_files(folder: Path, saved: Mapping[str, int]) -> None:
    """DeepSpeed itself fails on the rank that lacks a file, and the others wait for it."""
    found = _sizes(folder)
    for name, size in saved.items():
        if found.get(name) != size:
            raise damaged(
                folder / name, f"{found[name]} of {size} bytes" if name in found else "no such file"
            )


def _read_names(path: Path, ranks: int, rank: int) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {str(path)!r}: {error.strerror}. Save with"
            " dist_layerlr.checkpoint.save_deepspeed to have it."
        ) from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    if len(saved) != ranks:
        raise CheckpointError(
            f"DeepSpeed checkpoint {str(path.parent)!r} is of {len(saved)} ranks, this job has"
            f" {ranks}. Start it with as many, or save with dist_layerlr.save_checkpoint, which any"
            " number loads."
        )
    found: dict[str, Any] = saved[rank]
    return found


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(
        engine.optimizer, "loss_scale_config", None
    )
