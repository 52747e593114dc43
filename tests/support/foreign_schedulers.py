"""Schedulers of torch, transformers, diffusers, DeepSpeed, Accelerate, timm's manner, and users.

Each is a function optimizer -> scheduler. Rates in their settings are absolute, as their users give
them for one learning rate, ``BASE``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedSchedulerWrapper
from deepspeed.runtime import lr_schedules as ds
from diffusers import optimization as diffusers
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR
from transformers import optimization as hf

BASE = 2e-3
RUN = 60
"""Steps of the whole run."""
BY_METRIC = (lr.ReduceLROnPlateau, hf.GreedyLR)
Make = Callable[[torch.optim.Optimizer], Any]


@contextmanager
def accelerate_state() -> Iterator[None]:
    """Accelerate's objects need its state, a singleton."""
    Accelerator(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def advance(scheduler: Any, number: int, metric: float = 1.0) -> None:
    """Step it as its own trainer does, after optimizer step ``number``."""
    if isinstance(scheduler, DeepSpeedSchedulerWrapper):
        scheduler.scheduler.step()  # the engine does so
    elif isinstance(scheduler, TimmLike):
        scheduler.step_update(number)
    elif isinstance(scheduler, BY_METRIC):
        scheduler.step(metric)
    else:
        scheduler.step()


class TimmLike:
    """A scheduler as timm writes them: told the number of the update, absolute floors."""

    def __init__(self, optimizer: Any, warmup_init: float = 0.0, lr_min: float = 0.0):
        self.optimizer = optimizer
        self.base_values = [g.setdefault("initial_lr", g["lr"]) for g in optimizer.param_groups]
        self.warmup_lr_init, self.lr_min = warmup_init, lr_min
        self.step_update(0)

    def step(self, epoch: int, metric: float | None = None) -> None:
        """By epochs: nothing."""

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_values, strict=True):
            if num_updates < 5:
                group["lr"] = self.warmup_lr_init + (base - self.warmup_lr_init) * num_updates / 5
            else:
                height = 0.5 * (1 + math.cos(math.pi * (num_updates - 5) / (RUN - 5)))
                group["lr"] = self.lr_min + (base - self.lr_min) * max(0.0, height)


class Clamped:
    """What a user wraps around a scheduler: no group goes below a rate."""

    def __init__(self, scheduler: Any, floor: float):
        self.scheduler, self.floor = scheduler, floor

    def step(self) -> None:
        self.scheduler.step()
        for group in self.scheduler.optimizer.param_groups:
            group["lr"] = max(group["lr"], self.floor)


class ByHand:
    """A user's own: counts its steps and halves at every tenth."""

    def __init__(self, optimizer: Any):
        self.optimizer, self.steps = optimizer, 0
        self.first = [g.setdefault("initial_lr", g["lr"]) for g in optimizer.param_groups]

    def step(self) -> None:
        self.steps += 1
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            group["lr"] = first * 0.5 ** (self.steps // 10)


class Ramp:
    """A function with a state of its own: each call goes on from the last."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def __call__(self, step: int) -> float:
        before = self.seen.get(step - 1, 1.0)
        return self.seen.setdefault(step, before * 0.97)


def halves(step: int) -> float:
    return 0.5 ** (step / 20)


def sequence(o: Any, last: Callable[[Any], Any], first: int = 5) -> Any:
    return lr.SequentialLR(o, [lr.LinearLR(o, 0.1, total_iters=first), last(o)], [first])


def per_group(o: Any, share: float) -> list[float]:
    return [share * group["lr"] for group in o.param_groups]


def prepared(scheduler: Any, o: Any) -> Any:
    return AcceleratedScheduler(scheduler, AcceleratedOptimizer(o))


def reading_the_optimizer(o: Any) -> Any:
    """A function that looks at the live rate of the first group: it has sunk, so all sink."""
    top = o.param_groups[0]["lr"]
    return lr.MultiplicativeLR(o, lambda _: 0.9 if o.param_groups[0]["lr"] > top / 10 else 1.0)


TORCH: dict[str, Make] = {
    "LambdaLR": lambda o: lr.LambdaLR(o, halves),
    "LambdaLR ending at 0": lambda o: lr.LambdaLR(o, lambda step: 1 - step / RUN),
    "LambdaLR warmup": lambda o: lr.LambdaLR(o, lambda step: min(1.0, step / 10)),
    "LambdaLR of an object": lambda o: lr.LambdaLR(o, Ramp()),
    "LambdaLR above 1": lambda o: lr.LambdaLR(o, lambda step: 1 + step / RUN),
    "LambdaLR warmup without an end": lambda o: lr.LambdaLR(o, lambda step: step / 10),
    "LambdaLR of several": lambda o: lr.LambdaLR(
        o, [partial(pow, 0.9 + 0.05 * n) for n, _ in enumerate(o.param_groups)]
    ),
    "LambdaLR of several, late": lambda o: lr.LambdaLR(
        o, [lambda s, n=n: 1.0 if s < 50 else 0.5**n for n, _ in enumerate(o.param_groups)]
    ),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda _: 0.95),
    "MultiplicativeLR of a live rate": reading_the_optimizer,
    "StepLR": lambda o: lr.StepLR(o, 20),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [20, 50], 0.3),
    "ConstantLR": lambda o: lr.ConstantLR(o, 0.3, total_iters=10),
    "LinearLR": lambda o: lr.LinearLR(o, 0.1, total_iters=20),
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: lr.PolynomialLR(o, RUN, power=2.0),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, RUN),
    "CosineAnnealingLR eta_min": lambda o: lr.CosineAnnealingLR(o, RUN, eta_min=BASE / 10),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 15),
    "CosineAnnealingWarmRestarts eta_min": lambda o: lr.CosineAnnealingWarmRestarts(
        o, 15, eta_min=BASE / 10
    ),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, BASE, RUN, cycle_momentum=False),
    "OneCycleLR from its top": lambda o: lr.OneCycleLR(
        o, BASE, RUN, cycle_momentum=False, div_factor=1.0
    ),
    "CyclicLR": lambda o: lr.CyclicLR(o, BASE / 10, BASE, 15, cycle_momentum=False),
    "CyclicLR above": lambda o: lr.CyclicLR(o, BASE, 1.5 * BASE, 15, cycle_momentum=False),
    "CyclicLR of shares": lambda o: lr.CyclicLR(
        o, per_group(o, 0.1), per_group(o, 1.0), 15, cycle_momentum=False
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=BASE / 2, anneal_epochs=10),
    "SequentialLR": lambda o: sequence(o, lambda o: lr.CosineAnnealingLR(o, RUN - 5)),
    "SequentialLR eta_min": lambda o: sequence(
        o, lambda o: lr.CosineAnnealingLR(o, 20, eta_min=BASE / 10), first=40
    ),
    "ChainedScheduler": lambda o: lr.ChainedScheduler(
        [lr.ConstantLR(o, 0.1, 20), lr.ExponentialLR(o, 0.95)], optimizer=o
    ),
    "ChainedScheduler eta_min": lambda o: lr.ChainedScheduler(
        [lr.CosineAnnealingLR(o, RUN, eta_min=BASE / 9), lr.ExponentialLR(o, 0.99)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, factor=0.5, patience=7, eps=0.0),
    "ReduceLROnPlateau min_lr": lambda o: lr.ReduceLROnPlateau(
        o, factor=0.5, patience=7, min_lr=BASE / 4
    ),
    "ReduceLROnPlateau eps": lambda o: lr.ReduceLROnPlateau(
        o, factor=0.5, patience=7, eps=BASE / 3
    ),
}
TRANSFORMERS: dict[str, Make] = {
    "hf constant": hf.get_constant_schedule,
    "hf constant_with_warmup": lambda o: hf.get_constant_schedule_with_warmup(o, 10),
    "hf linear": lambda o: hf.get_linear_schedule_with_warmup(o, 5, RUN),
    "hf cosine": lambda o: hf.get_cosine_schedule_with_warmup(o, 5, RUN),
    "hf cosine_with_restarts": lambda o: hf.get_cosine_with_hard_restarts_schedule_with_warmup(
        o, 5, RUN, 3
    ),
    "hf polynomial": lambda o: hf.get_polynomial_decay_schedule_with_warmup(
        o, 5, RUN, lr_end=BASE / 10
    ),
    "hf inverse_sqrt": lambda o: hf.get_inverse_sqrt_schedule(o, 10),
    "hf cosine_with_min_lr": lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(
        o, 5, RUN, min_lr=BASE / 10
    ),
    "hf cosine_with_min_lr_rate": lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(
        o, 5, RUN, min_lr_rate=0.1
    ),
    "hf cosine_warmup_with_min_lr": lambda o: (
        hf.get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            o, 5, RUN, min_lr=BASE / 10, warmup_lr_rate=0.2
        )
    ),
    "hf warmup_stable_decay": lambda o: hf.get_wsd_schedule(o, 5, 20, num_training_steps=RUN),
    "hf reduce_lr_on_plateau": lambda o: hf.get_reduce_on_plateau_schedule(
        o, factor=0.5, patience=7, eps=0.0
    ),
    "hf greedy": lambda o: hf.GreedyLR(o, patience=5, min_lr=BASE / 2),
}
DIFFUSERS: dict[str, Make] = {
    "diffusers constant_with_warmup": lambda o: diffusers.get_constant_schedule_with_warmup(o, 9),
    "diffusers piecewise": lambda o: diffusers.get_piecewise_constant_schedule(
        o, "1:10,0.1:20,0.01"
    ),
    "diffusers linear": lambda o: diffusers.get_linear_schedule_with_warmup(o, 5, RUN),
    "diffusers cosine": lambda o: diffusers.get_cosine_schedule_with_warmup(o, 5, RUN),
    "diffusers polynomial": lambda o: diffusers.get_polynomial_decay_schedule_with_warmup(
        o, 5, RUN, lr_end=BASE / 10
    ),
}
DEEPSPEED: dict[str, Make] = {
    "ds WarmupLR": lambda o: ds.WarmupLR(o, warmup_num_steps=10),
    "ds WarmupLR linear": lambda o: ds.WarmupLR(o, warmup_num_steps=10, warmup_type="linear"),
    "ds WarmupLR max": lambda o: ds.WarmupLR(o, warmup_max_lr=BASE, warmup_num_steps=10),
    "ds WarmupLR max above": lambda o: ds.WarmupLR(
        o, warmup_max_lr=2.5 * BASE, warmup_num_steps=10
    ),
    "ds WarmupLR min": lambda o: ds.WarmupLR(o, warmup_min_lr=BASE / 10, warmup_num_steps=10),
    "ds WarmupLR of shares": lambda o: ds.WarmupLR(
        o, per_group(o, 0.1), per_group(o, 1.0), warmup_num_steps=10
    ),
    "ds WarmupDecayLR": lambda o: ds.WarmupDecayLR(o, RUN, warmup_max_lr=BASE, warmup_num_steps=10),
    "ds WarmupDecayLR of shares": lambda o: ds.WarmupDecayLR(
        o, RUN, warmup_max_lr=per_group(o, 1.0), warmup_num_steps=10
    ),
    "ds WarmupCosineLR": lambda o: ds.WarmupCosineLR(o, RUN, warmup_num_steps=10),
    "ds OneCycle": lambda o: ds.OneCycle(o, BASE / 10, BASE, cycle_first_step_size=15),
    "ds LRRangeTest": lambda o: ds.LRRangeTest(o, BASE / 10, 15),
    "ds LRRangeTest above": lambda o: ds.LRRangeTest(o, BASE / 10, 5),
}
ACCELERATE: dict[str, Make] = {
    "accelerate": lambda o: prepared(lr.StepLR(o, 20), o),
    "accelerate eta_min": lambda o: prepared(lr.CosineAnnealingLR(o, RUN, eta_min=BASE / 9), o),
    "accelerate by hand": lambda o: AcceleratedScheduler(
        hf.get_cosine_schedule_with_warmup(o, 5, RUN), o, step_with_optimizer=False
    ),
    "accelerate deepspeed WarmupLR": lambda o: DeepSpeedSchedulerWrapper(
        ds.WarmupLR(o, warmup_max_lr=BASE, warmup_num_steps=10), o
    ),
    "accelerate deepspeed WarmupCosineLR": lambda o: DeepSpeedSchedulerWrapper(
        ds.WarmupCosineLR(o, RUN, warmup_num_steps=10), o
    ),
}
OTHERS: dict[str, Make] = {
    "timm": TimmLike,
    "timm lr_min": lambda o: TimmLike(o, lr_min=BASE / 10),
    "timm warmup_lr_init": lambda o: TimmLike(o, warmup_init=BASE / 10),
    "a user's": ByHand,
    "a user's clamp": lambda o: Clamped(lr.ExponentialLR(o, 0.95), BASE / 10),
}
SCHEDULERS = {**TORCH, **TRANSFORMERS, **DIFFUSERS, **DEEPSPEED, **ACCELERATE, **OTHERS}
