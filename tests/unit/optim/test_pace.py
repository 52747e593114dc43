"""A schedule counts optimizer steps: what it looks like to trainers, and how it notices others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dist_layerlr as dl
from dist_layerlr.errors import ConfigError
from tests.support.naive import adamw, make_model, planned, step_on_filled_grads

LINEAR = dl.Schedule(kind="linear", total_steps=1001)
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "PlanSchedule": lambda optimizer, kind: dl.PlanSchedule(optimizer, LINEAR),
    "follow": lambda optimizer, kind: dl.optim.follow(
        optimizer, lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=1000)
    ),
}


@pytest.mark.parametrize("emission", ["groups", "segmented"])
@pytest.mark.parametrize("name", CALLS)
def test_a_schedule_that_runs_ahead_of_its_optimizer_says_so(name: str, emission: str):
    model = make_model()
    plan = dl.plan_model(model, {"learning_rate": 1e-3})
    optimizer = dl.attach(plan, model, adamw, emission=emission)
    schedule = CALLS[name](optimizer, None)

    def accumulate() -> None:
        for _ in range(10):
            step_on_filled_grads(model, optimizer)
            for _ in range(4):
                schedule.step()

    with pytest.raises(ConfigError, match="4 times for each optimizer step.*sync_gradients"):
        accumulate()
    assert schedule.factor > 0.95


def test_skipped_steps_of_a_loss_scale_are_no_reason_to_stop():
    model = make_model()
    _, optimizer = planned(model)
    schedule = dl.PlanSchedule(optimizer, LINEAR)
    for step in range(60):
        # The first scale is too high for 20 steps; later it is so at every twentieth.
        if step >= 20 and step % 20:
            step_on_filled_grads(model, optimizer)
        schedule.step()
    assert schedule.last_step == 60


def test_a_schedule_may_be_stepped_by_hand_without_any_optimizer_step():
    _, optimizer = planned(make_model())
    schedule = dl.PlanSchedule(optimizer, LINEAR)
    for _ in range(100):
        schedule.step()
    assert schedule.factor == pytest.approx(0.9)


def test_sub_groups_that_are_stepped_one_by_one_are_one_step():
    """As ZeRO-3 does."""
    model = make_model()
    _, optimizer = planned(model)
    schedule = dl.PlanSchedule(optimizer, LINEAR)
    for _ in range(50):
        for _ in range(3):
            step_on_filled_grads(model, optimizer)
        schedule.step()
    assert schedule.last_step == 50


def test_sub_groups_do_not_hide_a_schedule_that_runs_ahead():
    model = make_model()
    _, optimizer = planned(model)
    schedule = dl.PlanSchedule(optimizer, LINEAR)
    with pytest.raises(ConfigError, match="2 times for each optimizer step"):
        for _ in range(10):
            for _ in range(3):
                step_on_filled_grads(model, optimizer)
            for _ in range(2):
                schedule.step()


def test_the_optimizer_does_not_keep_a_schedule_alive():
    _, optimizer = planned(make_model())
    schedule = dl.PlanSchedule(optimizer, LINEAR)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    gone = weakref.ref(schedule)
    del schedule
    gc.collect()
    assert gone() is None and not optimizer._optimizer_step_post_hooks


def test_trainers_find_the_optimizer_and_the_rates_of_a_schedule():
    _, optimizer = planned(make_model())
    schedule = dl.PlanSchedule(optimizer, LINEAR)
    schedule.step()
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert schedule.optimizer is optimizer and schedule.last_epoch == 1
    rates = [group["lr"] for group in optimizer.param_groups]
    assert schedule.get_last_lr() == schedule.get_lr() == rates
    assert schedule.get_last_lr()[0] == optimizer.param_groups[0]["initial_lr"] * 0.999


@pytest.mark.parametrize("name", CALLS)
def test_a_group_that_nobody_planned_is_refused(name: str):
    optimizer = torch.optim.AdamW(make_model().parameters(), lr=1e-3)
    with pytest.raises(ConfigError, match="group 0 has no 'initial_lr'.*attach"):
        CALLS[name](optimizer, None)
