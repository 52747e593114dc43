"""What an integration needs when its trainer loads a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_layerlr.checkpoint.resume import refuse_other_model
from dist_layerlr.optim.groups import INITIAL_LR, NAME
from dist_layerlr.plan import Plan
from dist_layerlr.plan.diff import Rows


def refuse_other_names(path: Path, rows: Rows, plan: Plan) -> None:
    """Refuse a checkpoint of other trainable names, or of the same in another order.

    Trainers keep optimizer state by position.

    Raises:
        CheckpointError: names the first difference.
    """
    refuse_other_model(path, _difference(rows, plan))


def complete(optimizer: Any, prepared: Sequence[Mapping[str, Any]]) -> None:
    """Give groups what torch's load by name took from those that the checkpoint does not know.

    Args:
        optimizer: after the load.
        prepared: ``settings_of`` it before. Its names are this plan's: a scheduler is judged by
            them.
    """
    for group, before in zip(optimizer.param_groups, prepared, strict=False):
        group.update({k: v for k, v in before.items() if k not in group or k == NAME})


def factor_of(scheduler: Any) -> float:
    """The multiplier at which a scheduler was saved, whatever the rates that it multiplied."""
    bases = getattr(scheduler, "base_lrs", None) or [
        group[INITIAL_LR] for group in scheduler.optimizer.param_groups
    ]
    pairs = zip(scheduler.get_last_lr(), bases, strict=True)
    return next((rate / base for rate, base in pairs if base), 1.0)


def _difference(rows: Rows, plan: Plan) -> str | None:
    # State is kept by position: the trainable names must be the same, and in the same order.
    for old, new in zip(rows, plan.entries, strict=False):
        if old != new:
            return f"it trained {old} where this model trains {new}"
    for name, entry in plan.entries.items():
        if name in rows and rows[name]["numel"] != entry.numel:
            return f"its {name} has {rows[name]['numel']:,} elements, this model's {entry.numel:,}"
    if len(rows) != len(plan.entries):
        return f"it trained {len(rows)} parameters, this model trains {len(plan.entries)}"
    return None
