"""What a LayerLRTrainer reads of a Trainer's checkpoint before it resumes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_layerlr.checkpoint.resume import refuse_other_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import Plan
from dist_layerlr.plan.diff import PLAN_FILE, Rows, read_rows


def refuse_resume(trainer: Any, folder: Any) -> None:
    """Refuse a resume that would begin with an empty optimizer state.

    Raises:
        ConfigError: under FSDP1.
    """
    if folder and trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ConfigError(
            f"Invalid resume_from_checkpoint={str(folder)!r} under FSDP1: Accelerate loads no"
            " optimizer state from sharded checkpoints of FSDP1, and says nothing. Train with"
            " fsdp_config={'version': 2}."
        )


def resumed_rows(folder: Any, output_dir: str, plan: Plan) -> Rows | None:
    """The rows of the plan that a Trainer's checkpoint was trained with; None: no resume.

    Args:
        folder: ``resume_from_checkpoint``: a folder, or True for the last one in ``output_dir``.
        output_dir: of the trainer.
        plan: of the model that will be trained.

    Raises:
        ConfigError: another trainer wrote it.
        CheckpointError: of another model.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if isinstance(folder, bool):
        folder = get_last_checkpoint(output_dir) if folder and Path(output_dir).is_dir() else None
    if not folder:
        return None  # a Trainer raises where True finds none
    path = Path(folder)
    if not (path / PLAN_FILE).is_file():
        raise ConfigError(
            f"Invalid resume_from_checkpoint={str(folder)!r}: it has no {PLAN_FILE}, so that no"
            " LayerLRTrainer wrote it, and its optimizer state lies in another order. Start from"
            " its weights (from_pretrained) without resuming."
        )
    rows = read_rows(path) or {}
    refuse_other_model(path, _difference(rows, plan))
    return rows


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
