"""A schedule is a pure function step -> multiplier in [0, 1], the same for every parameter, counted in optimizer steps.

Multiplying every learning rate by one number keeps their ratios; the floor is a ratio too, never an absolute rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warmup, then constant, linear or cosine decay to ``min_ratio``."""

    kind: str = "constant"
    warmup_steps: int = 0
    """Optimizer steps from 0 to 1; step 0 trains at 1/warmup_steps already."""
    total_steps: int = 1
    """Optimizer steps of the whole run."""
    min_ratio: float = 0.0
    """Multiplier at the last step, 0..1."""

    def factor(self, step: int) -> float:
        """Multiplier of optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        span = max(1, self.total_steps - 1 - self.warmup_steps)
        x = min(1.0, (step - self.warmup_steps) / span)
        shape = 1.0 - x if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))
        return self.min_ratio + (1.0 - self.min_ratio) * shape
