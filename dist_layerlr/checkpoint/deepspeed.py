"""DeepSpeed engines: their counters and loss scale, and their own checkpoints, guarded by names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.checkpoint.folders import MANIFEST
from dist_layerlr.checkpoint.manifest import Manifest
from dist_layerlr.checkpoint.schema import checked, damaged, finite
from dist_layerlr.errors import CheckpointError
from dist_layerlr.files import write_text
from dist_layerlr.plan.entries import Plan
from dist_layerlr.proof.reapply import check_group_layout, group_layout, reapply
from dist_layerlr.ranks import alike, everyone, world_size

NAMES = "dist_layerlr_names.json"
"""The group layout of every rank, beside DeepSpeed's own files."""
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


def check_engine_state(folder: Path, manifest: Manifest) -> None:
    """Refuse a saved state that ``restore_engine`` could not set, or that names other attributes.

    Raises:
        CheckpointError: naming ``checkpoint.json`` and the field.
    """
    state = manifest.sharder_state
    if not state:
        return
    with checked(folder / MANIFEST):
        fields.known_keys("content.sharder_state", state, ("counters", "scale"))
        for key, names in (("counters", _COUNTERS), ("scale", _SCALE)):
            where = f"content.sharder_state.{key}"
            values = fields.mapping(where, state.get(key))
            fields.known_keys(where, values, names)
            for name, value in values.items():
                finite(f"{where}.{name}", value)


def restore_engine(model: Any, state: Mapping[str, Any]) -> None:
    """Inverse of ``engine_state``.

    A checkpoint of another sharder leaves the engine's own numbers.
    """
    if not hasattr(model, "zero_optimization_stage") or not state:
        return
    # The names were checked by check_engine_state: setattr must not take any name from a file.
    for name, value in state["counters"].items():
        setattr(model, name, value)
    scaler = _scaler(model)
    for name, value in state["scale"].items():
        # A static scaler has fewer attributes than the dynamic one that may have been saved.
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def save_deepspeed(folder: str | Path, plan: Plan, engine: Any, *, tag: str, **more: Any) -> None:
    """``engine.save_checkpoint`` with the layout of its groups by name beside it. Collective.

    Args:
        folder: DeepSpeed's ``save_dir``.
        plan: in force.
        engine: DeepSpeed's.
        tag: folder of this checkpoint.
        **more: further arguments of ``save_checkpoint``.
    """
    engine.save_checkpoint(str(folder), tag=tag, **more)
    # This is collective: when it returns, every rank has written its files, whose sizes follow.
    ranks = everyone(group_layout(plan, engine))

    def write() -> None:
        if engine.global_rank == 0:
            ranks[0]["files"] = _sizes(Path(folder) / tag)
            write_text(Path(folder) / tag / NAMES, json.dumps(ranks))

    alike(write)


def load_deepspeed(
    folder: str | Path, plan: Plan, engine: Any, *, tag: str, factor: float = 1.0, **more: Any
) -> Any:
    """``engine.load_checkpoint`` into the layout it was saved from, with the plan's rates after it.

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
        CheckpointError: no such layout, another number of ranks, or a file that is missing or of
            another length.
        PlanMismatch: names, order or sizes differ from the saved; nothing is loaded.
    """
    path = Path(folder) / tag / NAMES
    saved = alike(lambda: _read_names(path, world_size(), engine.global_rank))
    # Both checks come before the load, which fills the engine as it reads.
    check_group_layout(saved, plan, engine)
    alike(lambda: _check_files(path.parent, saved.get("files", {})))
    _, client = engine.load_checkpoint(str(folder), tag=tag, **more)
    reapply(plan, engine, factor=factor)
    return client


def _sizes(folder: Path) -> dict[str, int]:
    """{file: bytes} of what DeepSpeed has written, as one rank sees it."""
    sizes: dict[str, int] = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != NAMES:
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


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
    found = saved[rank] if isinstance(saved, list) else None
    if not isinstance(found, dict):
        raise damaged(path, "it does not list one layout for each rank")
    return found


def _scaler(engine: Any) -> Any:
    # ZeRO and BF16_Optimizer hold a scaler; the fp16 optimizers of stage 0 hold its settings.
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(
        engine.optimizer, "loss_scale_config", None
    )
