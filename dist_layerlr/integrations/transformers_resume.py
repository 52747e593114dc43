"""What a LayerLRTrainer reads of a Trainer's checkpoint before it resumes from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations.resumed import refuse_other_names
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
    refuse_other_names(path, rows, plan)
    return rows
