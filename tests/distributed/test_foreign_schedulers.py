"""Schedulers of other people: accepted if and only if a run that is stepped by hand agrees.

The reference is the test's own. Each scheduler drives a real optimizer of a real plan (ordinary
groups, or segments) and, built anew, an optimizer with one group at the plan's base rate. Every
gradient is 1, so that SGD moves a weight by exactly the rate at which it is trained. Right is:
every name moves, at every step, by its planned rate times what the one group moves by over the base
rate, and that multiplier lies in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr import Plan, attach, plan_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim import check_scheduler
from tests.support.foreign_schedulers import (
    BASE,
    BY_METRIC,
    RUN,
    SCHEDULERS,
    accelerate_state,
    advance,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
EMISSIONS = ("groups", "segmented")
RATES = {"self_attn": 5 * BASE, "ffn": BASE}
BLOCK = {"enabled": True, "component_lr": RATES, "default_lr": BASE, "depth_strategy": "flat"}
CASES = [(name, emission) for name in SCHEDULERS for emission in EMISSIONS]


@pytest.fixture(scope="module", autouse=True)
def accelerate() -> Iterator[None]:
    with accelerate_state():
        yield


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups)


def toy() -> nn.Module:
    torch.manual_seed(0)
    block = {"attn": nn.Linear(1, 1, bias=False), "ffn": nn.Linear(1, 1, bias=False)}
    return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(block)])})


def planned(emission: str) -> tuple[nn.Module, Plan, torch.optim.Optimizer]:
    model = toy()
    plan = plan_model(model, {"learning_rate": BASE, "per_layer_lr": BLOCK})
    return model, plan, attach(plan, model, sgd, emission=emission)


def moves(params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """What one step on gradients of 1 takes off each weight."""
    for param in params:
        param.data.zero_()
        param.grad = torch.ones_like(param)
    optimizer.step()
    return [-float(param.detach()) for param in params]


def stepped_by_hand(name: str, emission: str, metric: Callable[[int], float]) -> str | None:
    """Where the scheduler first trains a name at another rate than planned x one multiplier."""
    model, plan, optimizer = planned(emission)
    wanted = {n: plan.entries[n].lr for n, _ in model.named_parameters()}
    assert sorted(wanted.values()) == pytest.approx([BASE, 5 * BASE])
    alone = nn.Parameter(torch.zeros(1))
    single = torch.optim.SGD([{"params": [alone], "lr": BASE, "initial_lr": BASE}], lr=BASE)
    theirs, ours = SCHEDULERS[name](single), SCHEDULERS[name](optimizer)
    for step in range(RUN + 1):
        if step:
            advance(theirs, step, metric(step))
            advance(ours, step, metric(step))
        factor = moves([alone], single)[0] / BASE
        found = moves(list(model.parameters()), optimizer)
        for (param, rate), move in zip(wanted.items(), found, strict=True):
            if move != pytest.approx(rate * factor, rel=2e-6, abs=1e-30):
                return f"step {step}: {param} moved {move:g}, one group x {factor:g}"
        if not 0.0 <= factor <= 1.0 + 2e-6:
            return f"step {step}: x {factor:g}"
    return None


METRICS: tuple[Callable[[int], float], ...] = (lambda _: 1.0, float, lambda step: -float(step))


@cache
def reference(name: str, emission: str) -> str | None:
    """For any metric, if it waits for one: one that stays, that rises, that falls."""
    waits = isinstance(SCHEDULERS[name](planned(emission)[2]), BY_METRIC)
    metrics = METRICS if waits else METRICS[:1]
    found = (stepped_by_hand(name, emission, metric) for metric in metrics)
    return next((text for text in found if text is not None), None)


def verdict(scheduler: Any, **how: Any) -> str | None:
    try:
        check_scheduler(scheduler, **how)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("name", "emission"), CASES)
def test_it_is_accepted_if_and_only_if_a_hand_stepped_run_agrees(name: str, emission: str):
    _, _, optimizer = planned(emission)
    scheduler = SCHEDULERS[name](optimizer)
    for how in ({"steps": RUN}, {}):
        found = verdict(scheduler, **how)
        assert (found is None) == (reference(name, emission) is None), (
            f"check_scheduler: {found}\nby hand: {reference(name, emission)}"
        )


@pytest.mark.parametrize("emission", EMISSIONS)
def test_the_table_has_many_that_are_right_and_many_that_are_wrong(emission: str):
    wrong = [name for name in SCHEDULERS if reference(name, emission) is not None]
    assert len(SCHEDULERS) >= 40
    assert len(wrong) >= (25 if emission == "groups" else 6)
    assert len(SCHEDULERS) - len(wrong) >= 30


@pytest.mark.parametrize(("name", "emission"), CASES)
def test_a_class_of_another_name_gives_the_same_verdict(name: str, emission: str):
    _, _, optimizer = planned(emission)
    scheduler = SCHEDULERS[name](optimizer)
    parts = [scheduler, *getattr(scheduler, "_schedulers", [])]
    for part in (p for p in parts if p is not None):
        part.__class__ = type("Renamed", (type(part),), {})
    found = verdict(scheduler)
    assert (found is None) == (reference(name, emission) is None), found


@pytest.mark.parametrize(("name", "emission"), CASES)
def test_neither_the_scheduler_nor_its_optimizer_is_touched(name: str, emission: str):
    """Whatever it was told, it goes on as one that was never asked."""
    asked, other = planned(emission)[2], planned(emission)[2]
    schedulers = SCHEDULERS[name](asked), SCHEDULERS[name](other)
    for step in range(1, RUN // 2):
        verdict(schedulers[0], steps=5 if step % 10 == 0 else 1)
        for scheduler in schedulers:
            advance(scheduler, step)
        assert without_params(asked) == without_params(other), step


def without_params(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [
        {k: copy.copy(v) for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize(("name", "emission"), CASES)
def test_the_verdict_holds_in_the_middle_of_a_run(name: str, emission: str):
    _, _, optimizer = planned(emission)
    scheduler = SCHEDULERS[name](optimizer)
    if reference(name, emission) is None:
        for step in range(1, RUN // 2):
            advance(scheduler, step)
        assert verdict(scheduler, steps=RUN // 2) is None
