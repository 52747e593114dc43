"""Drive the live groups by a schedule: one multiplier, counted in optimizer steps."""

from __future__ import annotations

from typing import Any

from dist_layerlr.groups import scale_lrs
from dist_layerlr.schedule import Schedule


class PlanSchedule:
    """Multiplies every planned rate by ``schedule.factor(step)``.

    It is no torch scheduler, so neither Accelerate nor DeepSpeed steps it: call ``step()`` once after each optimizer
    step. It reads the live groups on every call, so groups may be replaced by a load or a wrapper.
    """

    def __init__(self, optimizer: Any, schedule: Schedule):
        """Put the rates of step 0 in force.

        Args:
            optimizer: a torch optimizer, a wrapper of one, or a DeepSpeed engine.
            schedule: step -> multiplier.
        """
        self._optimizer = optimizer.optimizer if hasattr(optimizer, "zero_optimization_stage") else optimizer
        self._schedule = schedule
        self.last_step = 0
        scale_lrs(self._optimizer, self.factor)

    @property
    def factor(self) -> float:
        """The multiplier in force."""
        return self._schedule.factor(self.last_step)

    def step(self) -> None:
        """Advance by one optimizer step."""
        self.last_step += 1
        scale_lrs(self._optimizer, self.factor)

    def state_dict(self) -> dict[str, int]:
        """The step alone: rates come from the plan."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved step."""
        self.last_step = state["last_step"]
        scale_lrs(self._optimizer, self.factor)
