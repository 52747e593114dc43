"""Whether a schedule keeps pace with its optimizer: one step of the one for each of the other."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError
from dist_layerlr.sharders.base import live_optimizer

_SURE = 8
"""Optimizer steps in a row that each had several schedule steps.

A loss scale that is too high skips several optimizer steps at once, and then none for long; the
micro-steps of an accumulation come again and again.
"""


class Pace:
    """Counts the schedule's steps between two real steps of the optimizer.

    An optimizer that is never stepped tells nothing: a schedule may be stepped by hand. Nor do
    several steps of an optimizer in a row: ZeRO-3 steps one sub-group after the other.
    """

    def __init__(self, optimizer: Any):
        """Listen to the optimizer inside ``optimizer``, for as long as this object lives."""
        self._optimizer = optimizer
        self._since = self._before = 0
        """Schedule steps since the last optimizer step, and before it."""
        self._several = 0
        """Optimizer steps in a row that had several."""
        self._trained = False
        """Whether the optimizer has been stepped."""
        live = live_optimizer(optimizer)
        if not isinstance(live, Optimizer):
            return
        mine = weakref.ref(self)

        def stepped(*_: Any) -> None:
            pace = mine()
            if pace is not None:
                pace._stepped()

        weakref.finalize(self, live.register_step_post_hook(stepped).remove)

    def counts(self) -> bool:
        """Whether a step of the schedule, now, belongs to a step of the optimizer.

        Raises:
            ConfigError: the schedule was stepped several times for each of the last optimizer
                steps.
        """
        # Accelerate's optimizer does nothing in the micro-steps of ``accumulate`` and where the
        # loss scale overflowed, and its scheduler is stepped once per process. Without Accelerate
        # the optimizer is believed to have been stepped.
        accelerate = _accelerate()
        if accelerate is not None and not accelerate.sync_gradients:
            return False
        if getattr(self._optimizer, "step_was_skipped", False):
            return False
        if accelerate is not None and self._trained and self._since:
            return False
        self._since += 1
        if self._several >= _SURE:
            raise ConfigError(
                f"Invalid schedule: it is stepped {self._before} times for each optimizer step, so"
                " it runs ahead of the training. Call step() once per optimizer step: not in the"
                " micro-steps of an accumulation (build it on the optimizer that"
                " accelerator.prepare returned, or ask accelerator.sync_gradients or"
                " engine.is_gradient_accumulation_boundary()), and not once per process."
            )
        return True

    def _stepped(self) -> None:
        self._trained = True
        if self._since == 0:
            return
        self._several = self._several + 1 if self._since > 1 else 0
        self._before, self._since = self._since, 0


def _accelerate() -> Any:
    """Accelerate's gradient state, one for all of a process; None: there is no Accelerator."""
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    # An object of the class would make the state that it is asked for.
    return state() if state is not None and state._shared_state else None
