"""Any scheduler as one multiplier: its absolute rates become ratios to the plan's base rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.groups import LR, default_lr
from dist_layerlr.optim.rehearsal import StandIn
from dist_layerlr.optim.schedule import RateDriver
from dist_layerlr.optim.schedulers import problem_of
from dist_layerlr.sharders.base import live_optimizer


class Follower(RateDriver):
    """Multiplies every planned rate by what a scheduler does to one group; made by ``follow``."""

    def __init__(
        self, optimizer: Any, make_scheduler: Callable[[Any], Any], base_lr: float | None = None
    ):
        """Build the scheduler on a scratch optimizer, and put its first rate in force."""
        super().__init__(optimizer)
        live = live_optimizer(self.optimizer)
        self.base_lr = _base_of(live, base_lr)
        """What the scheduler sees as the optimizer's only rate."""
        defaults = {**getattr(live, "defaults", {}), LR: self.base_lr}
        self._scratch = StandIn([{LR: self.base_lr}], defaults)
        self._scheduler = make_scheduler(self._scratch)
        problem = problem_of(self._scheduler, base=self.base_lr)
        if problem is not None:
            raise ConfigError(
                f"Invalid scheduler {type(self._scheduler).__name__} to follow from"
                f" base_lr={self.base_lr:g}: {problem}. Let it stay between 0 and the base rate."
            )
        self._put()

    @property
    def factor(self) -> float:
        """The multiplier in force: the scheduler's rate over the base rate."""
        return float(self._scratch.param_groups[0][LR]) / self.base_lr

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Advance the scheduler by one optimizer step; it is given the arguments (a metric ...)."""
        if self._counts():
            self._scheduler.step(*args, **kwargs)
            self.last_step += 1
            self._put()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state and its scratch group, of which many schedulers compute the next.

        Rates are relative to ``base_lr``, so a load under another plan goes on at the same ratios.
        """
        group = {k: v for k, v in self._scratch.param_groups[0].items() if k != "params"}
        return {
            "base_lr": self.base_lr,
            "last_step": self.last_step,
            "group": group,
            "scheduler": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.base_lr = float(state_dict["base_lr"])
        self._scratch.param_groups[0].update(state_dict["group"])
        self._scheduler.load_state_dict(state_dict["scheduler"])
        # States of earlier releases are of plans without timings, which need no step.
        self.last_step = int(state_dict.get("last_step", 0))
        self._put()


def follow(
    optimizer: Any, make_scheduler: Callable[[Any], Any], *, base_lr: float | None = None
) -> Follower:
    """Drive planned rates by a scheduler that was written for one learning rate.

    ``scheduler = follow(optimizer, lambda o: CosineAnnealingLR(o, 1000, eta_min=1e-6))``. The
    scheduler sees one group at the plan's base rate; every planned rate is multiplied by its rate
    over the base rate. Its absolute rates (floors, warmup starts, ``max_lr``) are ratios then. Only
    the rate is followed, not a momentum that a scheduler cycles.

    Args:
        optimizer: a torch optimizer, a wrapper of one, or a DeepSpeed engine.
        make_scheduler: optimizer -> scheduler, of any library.
        base_lr: the one rate. None: the plan's ``default_lr``, which `attach` has told the
            optimizer, or the ``lr`` that it was built with.

    Returns:
        What to step once per optimizer step, with ``factor``, ``state_dict`` and
        ``load_state_dict``.

    Raises:
        ConfigError: no base rate is known, or the scheduler leaves [0, base_lr].
    """
    return Follower(optimizer, make_scheduler, base_lr)


def _base_of(optimizer: Any, wanted: float | None) -> float:
    found = default_lr(optimizer) if wanted is None else wanted
    if found is None:
        raise ConfigError(
            "Invalid base_lr=None: the optimizer was built without attach and without an lr, so"
            " nobody knows what a scheduler's absolute rates are relative to. Give base_lr."
        )
    fields.number(0.0)("base_lr", found)
    if not found > 0.0:
        raise ConfigError(f"Invalid base_lr={found}: must be > 0. Give the rate of the plan.")
    return found
