"""What a run consists of, in one object: every part of the trainer that needs several takes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dist_layerlr.plan import Plan
from launch.trainer.data.base import Dataset
from launch.trainer.ema import Ema
from launch.trainer.engines.base import Engine
from launch.trainer.families.base import Family
from launch.trainer.objectives import Objective
from launch.trainer.options import RunOptions
from launch.trainer.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, as told, by whom, and where it goes."""

    engine: Engine
    """The model and its optimizer, ready to step."""
    family: Family
    """How the model is called, and for which objective."""
    objective: Objective
    """What a step minimises."""
    data: Dataset
    """What trains."""
    held: Dataset | None = None
    """What is held out, for the validation loss."""
    ema: Ema | None = None
    """The average of the trained weights."""
    options: RunOptions
    runtime: Runtime
    """This rank."""
    folder: Path
    """Output folder of the run; only rank 0 writes into it."""
    network: str = ""
    """Its component of the pipeline where the run trains several; ``folder`` is then a sub-folder
    of that name."""
    run_id: str
    """Names this start of the run, in its checkpoints and in ``final/``."""

    @property
    def plan(self) -> Plan:
        """The learning rates that the engine steps with: a run may change them on its way."""
        return self.engine.plan
