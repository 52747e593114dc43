"""The length of a run: given in steps, or in epochs, which are steps once the data set is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim import Schedule
from launch.trainer.data.base import Dataset
from launch.trainer.data.order import Order, buckets_of

if TYPE_CHECKING:
    from launch.trainer.options import RunOptions


def check_length(train: Mapping[str, Any]) -> None:
    """Refuse a length that is given twice.

    Raises:
        ConfigError: both ``train.steps`` and ``train.epochs``.
    """
    if "steps" in train and "epochs" in train:
        raise ConfigError(
            f"Invalid train.steps={train['steps']!r} with train.epochs={train['epochs']!r}: each"
            " says how long the run is; remove one of them."
        )


def cut_short(train: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Return a ``train`` block of this many steps, whatever length it had.

    Raises:
        ConfigError: it has two.
    """
    check_length(train)
    return {**{key: value for key, value in train.items() if key != "epochs"}, "steps": steps}


def schedule_of(values: Mapping[str, Any], steps: int, *, cut_short: bool) -> Schedule:
    """Return the schedule of a run of this length; 0: not known yet, as with ``train.epochs``.

    Args:
        values: The ``schedule`` block.
        steps: Of the run.
        cut_short: By ``--max-steps``: it may end within its warmup.

    Raises:
        ConfigError: a warmup that is longer than the run.
    """
    warmup = values.get("warmup_steps", 0)
    if warmup > steps > 0 and not cut_short:
        allowed = f"an integer in [0, train.steps={steps}]"
        raise fields.invalid("schedule.warmup_steps", warmup, allowed)
    return Schedule(total_steps=max(1, steps), **values)


def steps_of(options: RunOptions, data: Dataset, done: int, samples: int) -> int:
    """Return how many optimizer steps ``train.epochs`` are.

    A run that goes on with another global batch trains what is left of its epochs.

    Args:
        options: Of the run.
        data: The samples that train.
        done: Optimizer steps that were done before.
        samples: Samples that were seen in them.

    Raises:
        ConfigError: more was trained already, or the warmup is longer than the run.
    """
    train = options.train
    assert train.epochs is not None, "asked of a run whose length is in steps"
    epoch = Order(buckets_of(data), train.seed, train.global_batch).epoch
    # As the config writes it: 0.1 of 30 samples are 3, and in binary a little more.
    left = Fraction(str(train.epochs)) * epoch - samples
    if left <= -train.global_batch:
        allowed = f"at least {samples / epoch:g}, the epochs of the checkpoint's {samples} samples"
        raise fields.invalid("train.epochs", train.epochs, allowed)
    steps = done + math.ceil(left / train.global_batch)
    if options.schedule.warmup_steps > steps:
        allowed = f"an integer in [0, {steps}], the steps of train.epochs={train.epochs:g}"
        raise fields.invalid("schedule.warmup_steps", options.schedule.warmup_steps, allowed)
    return steps


def with_steps(options: RunOptions, steps: int) -> RunOptions:
    """Return the options of a run of this many steps."""
    return replace(
        options,
        train=replace(options.train, steps=steps),
        schedule=replace(options.schedule, total_steps=steps),
    )
