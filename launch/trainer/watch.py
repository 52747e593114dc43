"""What a run measures beside the loss: cells of the grid, speed, time left, waiting for data."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from dist_layerlr import CellMetrics
from dist_layerlr.optim import Reading
from launch.trainer.job import Job
from launch.trainer.options import TrainOptions
from launch.trainer.team import Team

_RECENT = 50
"""Steps whose median says how long the rest will take: a step with a new shape, or the first, is
slower."""


class Cells:
    """Metrics per cell of each network, every ``train.cells_every`` steps. All calls collective."""

    def __init__(self, team: Team):
        settings = team.face.options
        asked = settings.plan.per_layer_lr.log_grad_norms
        self._every = settings.train.cells_every if asked else None
        self._last = settings.train.steps - 1
        self._of: dict[str, CellMetrics] = {}

    def before(self, name: str, job: Job, step: int) -> None:
        """Arm the network's metrics if this step is to be measured."""
        if self._every is None or not (step % self._every == 0 or step == self._last):
            return
        if name not in self._of:
            # Only now: a checkpoint that was loaded may have replaced groups and states.
            self._of[name] = CellMetrics(
                job.plan, job.engine.model, job.engine.optimizer, every=None
            )
        self._of[name].arm()

    def after(self, name: str) -> Reading | None:
        """Return what the step was, where it was measured."""
        return self._of[name].read() if name in self._of else None


class Pace:
    """How fast the run is, and when it will end."""

    def __init__(self, train: TrainOptions):
        self._train = train
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def row(self, step: int, seconds: float, tokens: float, waited: float) -> dict[str, Any]:
        """Return the speeds of a step.

        Args:
            step: That was done.
            seconds: That it took.
            tokens: That all ranks trained in it.
            waited: Seconds that a rank waited for its samples, the mean over ranks.
        """
        self._recent.append(seconds)
        left = self._train.steps - step - 1
        return {
            "s_per_step": seconds,
            "samples_per_s": self._train.global_batch / seconds,
            "tokens_per_s": tokens / seconds,
            "data_wait_s": waited,
            "eta_s": left * statistics.median(self._recent),
        }
