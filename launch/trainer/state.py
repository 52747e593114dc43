"""Where a run begins, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run begins or continues."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples seen."""
    observed: Mapping[str, float] = field(default_factory=dict)
    """``Outcome.observed`` of the first step, if an earlier process did it."""
    validation: Mapping[str, Any] = field(default_factory=dict)
    """``Validation.state``."""

    def samples_at(self, step: int, global_batch: int) -> int:
        """Samples seen before a step."""
        return self.samples + (step - self.step) * global_batch


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the training loop ended."""

    steps: int
    """Optimizer steps done, by earlier processes too."""
    stopped: bool
    """Whether a signal or ``steer.json`` ended it early."""
    enough: bool = False
    """Whether ``train.early_stop`` ended it."""
    last_factor: float
    """Schedule multiplier of the last step."""
    observed: Mapping[str, float]
    """{name: rate at which the first step moved it}. Only what this rank holds, and only where
    the update shows the rate."""
