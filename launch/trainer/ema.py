"""The config's ``ema`` block: an average of the trained weights, which is what a run results in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting
from dist_layerlr.optim import WeightAverage

if TYPE_CHECKING:
    from launch.trainer.engines.base import Engine
    from launch.trainer.job import Job

HOST, DEVICE = "host", "device"


@dataclass(frozen=True, kw_only=True)
class EmaOptions:
    """An exponential moving average of the weights that train."""

    decay: float | None = setting(
        fields.number(0.0, 1.0),
        default=None,
        shown="no average",
        doc="Share of the average that a step keeps. `final/`, samples and the validation loss are"
        " then of the average; checkpoints hold both.",
    )
    every: int = setting(
        fields.integer(1),
        default=1,
        unit="steps",
        doc="Between updates, each with decay to the power of these steps.",
    )
    warmup: bool = setting(
        fields.boolean,
        default=True,
        doc="After n steps keep (1 + n) / (10 + n) at most, so that a short run's average forgets"
        " where it began.",
    )
    device: str = setting(
        fields.one_of(lambda: (DEVICE, HOST)),
        default=DEVICE,
        doc="Where it is. `host` costs the way of the weights at each update.",
    )

    @property
    def on(self) -> bool:
        """Whether there is an average."""
        return self.decay is not None

    def kept(self, steps: int) -> float:
        """The share that is kept in the update after ``steps`` steps."""
        assert self.decay is not None, "asked of a run without an average"
        warm = min(self.decay, (1 + steps) / (10 + steps)) if self.warmup else self.decay
        return float(warm**self.every)


def read_ema(values: Mapping[str, Any]) -> EmaOptions:
    """Make the block of what a config gives, checked field by field already.

    Raises:
        ConfigError: settings of an average that is not there, or one that never moves.
    """
    found = EmaOptions(**values)
    if values and not found.on:
        raise ConfigError(
            f"Invalid ema.{next(iter(values))} without an average: add ema.decay, or remove it."
        )
    if found.decay == 1.0 and not found.warmup:
        raise ConfigError(
            "Invalid ema.decay=1 with ema.warmup=false: the average would never move from the"
            " weights that the run begins with. Use a decay below 1, such as 0.999."
        )
    return found


class Ema:
    """The average of one network."""

    def __init__(self, options: EmaOptions, engine: Engine):
        """Begin with the weights of an engine."""
        device = torch.device("cpu") if options.device == HOST else None
        self._options = options
        self.average = WeightAverage(engine.model, engine.optimizer, device=device)

    def after(self, steps: int) -> None:
        """Update it, if that is due after ``steps`` steps of its network."""
        if steps % self._options.every == 0:
            self.average.update(self._options.kept(steps))


def ema_of(options: EmaOptions, engine: Engine) -> Ema | None:
    """Return the average of a network; None where none is asked for."""
    return Ema(options, engine) if options.on else None


@contextmanager
def averaged(jobs: Iterable[Job]) -> Iterator[None]:
    """Have networks hold their averages while inside, where they have any. Collective."""
    with ExitStack() as stack:
        for job in jobs:
            if job.ema is not None:
                stack.enter_context(job.ema.average.swapped())
        yield


def in_checkpoint(job: Job) -> AbstractContextManager[None]:
    """Have a checkpoint that is saved or loaded inside hold the average, where there is one."""
    return nullcontext() if job.ema is None else job.ema.average.in_state()
