"""A schedule: a pure function from the optimizer step to one multiplier in [0, 1].

It is the same for every parameter and counts optimizer steps, never micro-steps or ranks.
Multiplying every learning rate by one number keeps their ratios; the floor is a ratio too, never an
absolute rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import check_all, integer, number, one_of, setting
from dist_layerlr.optim.groups import INITIAL_LR, LR, scale_lrs
from dist_layerlr.optim.pace import Pace
from dist_layerlr.plan.timing import KINDS, curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warmup, then constant, linear or cosine decay to ``min_ratio``."""

    kind: str = setting(
        one_of(lambda: KINDS), default="constant", key="type", doc="Shape after the warmup."
    )
    warmup_steps: int = setting(
        integer(0),
        default=0,
        unit="optimizer steps",
        doc="From 0 to the planned rates; step 0 trains at 1/warmup_steps already.",
    )
    total_steps: int = 1
    """Optimizer steps of the whole run."""
    min_ratio: float = setting(
        number(0.0, 1.0), default=0.0, doc="Multiplier of the rates at the last step."
    )

    def __post_init__(self) -> None:
        """Refuse what a config file would be refused for: an unknown kind is no cosine.

        Raises:
            ConfigError: names the field.
        """
        check_all(self)
        integer(1)("total_steps", self.total_steps)

    def factor(self, step: int) -> float:
        """Multiplier of optimizer step ``step``, counted from 0."""
        return curve(self.kind, step, self.warmup_steps, self.total_steps, self.min_ratio)


class RateDriver(LRScheduler):
    """What multiplies all planned rates of an optimizer by one ``factor``, step by step.

    It reads the live groups on every call, so groups may be replaced by a load or a wrapper.
    Trainers take it for a scheduler by its type. None of that type's own work is done here: it
    would write absolute rates, and its state would hold them.
    """

    def __init__(self, optimizer: Any):
        """Drive the groups of a torch optimizer, a wrapper of one, or a DeepSpeed engine.

        Raises:
            ConfigError: a group does not say what a factor would multiply.
        """
        # Trainers look a scheduler up by its optimizer. Those of engines are no torch optimizers,
        # which the constructor of the base class would ask for.
        self.optimizer: Any = (
            optimizer.optimizer if hasattr(optimizer, "zero_optimization_stage") else optimizer
        )
        for place, group in enumerate(self.optimizer.param_groups):
            if INITIAL_LR not in group:
                raise ConfigError(
                    f"Invalid optimizer for a schedule: group {place} has no {INITIAL_LR!r}, the"
                    " planned rate that a schedule multiplies. Build the optimizer with attach, or"
                    " its groups with param_groups."
                )
        self._pace = Pace(self.optimizer)
        self.last_step = 0
        """The optimizer step whose rates are in force, counted from 0."""
        self._step_count = 1  # Accelerate counts it up in micro-steps

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The planned rates, by group."""
        return [float(group[INITIAL_LR]) for group in self.optimizer.param_groups]

    @property
    def factor(self) -> float:
        """The multiplier in force."""
        raise NotImplementedError

    def get_last_lr(self) -> list[Any]:
        """The rates in force, by group, as torch's schedulers tell them."""
        return [float(group[LR]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[Any]:
        """As ``get_last_lr``."""
        return self.get_last_lr()

    def _counts(self) -> bool:
        """Whether this call of ``step()`` belongs to an optimizer step, as far as can be told."""
        return self._pace.counts()

    def _put(self) -> None:
        scale_lrs(self.optimizer, self.factor, self.last_step)


class PlanSchedule(RateDriver):
    """Multiplies every planned rate by ``schedule.factor(step)``.

    Call ``step()`` once after each optimizer step, or let a trainer do so. Where Accelerate is in
    use, which steps a prepared scheduler once per process, only the first call after a real
    optimizer step counts, and none in the micro-steps of ``accumulate``.
    """

    def __init__(self, optimizer: Any, schedule: Schedule):
        """Put the rates of step 0 in force.

        Args:
            optimizer: a torch optimizer, a wrapper of one, or a DeepSpeed engine.
            schedule: step -> multiplier.
        """
        super().__init__(optimizer)
        self._schedule = schedule
        self._put()

    @property
    def factor(self) -> float:
        """The multiplier in force."""
        return self._schedule.factor(self.last_step)

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """As ``last_step``, in the words of torch's schedulers."""
        return self.last_step

    def step(self, epoch: int | None = None) -> None:
        """Advance by one optimizer step, whatever epoch a trainer names.

        Raises:
            ConfigError: it is called several times for each optimizer step.
        """
        if self._counts():
            self.last_step += 1
            self._put()

    def state_dict(self) -> dict[str, int]:
        """The step alone: rates come from the plan."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved step."""
        self.last_step = state_dict["last_step"]
        self._put()
