"""Silent failures of one process's groups: loads by position, schedulers that write one rate.

Numbers in the names are the rows of the table of 22 silent failures, as in test_silent_plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.naive import (
    adamw,
    config,
    copy_of,
    fill_grads,
    make_model,
    movement,
    naive_groups,
    planned,
    step_on_filled_grads,
    wanted_rates,
)

# --- 3: torch matches groups by position on load ---


def two_layers(order: tuple[str, str]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    rates = {"a": 1e-2, "b": 1e-4}
    groups = [
        {"params": [(f"{name}.weight", model[name].weight)], "lr": rates[name]} for name in order
    ]
    return model, torch.optim.AdamW(groups, weight_decay=0.0)


def test_03_naive_load_into_swapped_groups_swaps_rates_moments_and_their_labels() -> None:
    model, optimizer = two_layers(("a", "b"))
    step_on_filled_grads(model, optimizer)
    other, swapped = two_layers(("b", "a"))
    swapped.load_state_dict(optimizer.state_dict())
    rates = {id(p): group["lr"] for group in swapped.param_groups for p in group["params"]}
    assert (rates[id(other["a"].weight)], rates[id(other["b"].weight)]) == (1e-4, 1e-2)
    moments = (
        swapped.state[other["a"].weight]["exp_avg"],
        optimizer.state[model["b"].weight]["exp_avg"],
    )
    assert torch.equal(*moments)
    assert swapped.param_groups[0]["param_names"] == ["a.weight"]
    assert swapped.param_groups[0]["params"][0] is other["b"].weight


def test_03_check_manifest_refuses_swapped_groups_before_the_load() -> None:
    model, optimizer = two_layers(("a", "b"))
    rule = {
        "per_layer_lr": {
            "enabled": True,
            "component_lr": {},
            "default_lr": 1e-2,
            "unmatched": "default",
        }
    }
    plan = dist_layerlr.plan_model(model, rule)
    saved = dist_layerlr.proof.manifest(plan, model, optimizer)
    dist_layerlr.proof.check_manifest(saved, plan, model, optimizer)
    other, swapped = two_layers(("b", "a"))
    with pytest.raises(PlanMismatch, match=r"a\.weight.*b\.weight"):
        dist_layerlr.proof.check_manifest(saved, plan, other, swapped)


# --- 5: schedulers that write one rate (torch's; DeepSpeed's are tested on engines) ---

RATIO = 100.0


def two_rates() -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    return torch.optim.SGD(
        [{"params": [params[0]], "lr": 4e-4}, {"params": [params[1]], "lr": 4e-6}], momentum=0.9
    )


def ratio_after(scheduler: Any, steps: int = 10) -> float:
    for _ in range(steps):
        scheduler.optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    high, low = (group["lr"] for group in scheduler.optimizer.param_groups)
    return high / low


Make = Callable[[torch.optim.Optimizer], Any]
FLATTENS: dict[str, tuple[Make, float]] = {
    "OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=12), 1.0),
    "CyclicLR": (
        lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-5, max_lr=1e-3, step_size_up=4),
        1.0,
    ),
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=1e-5), 1.0),
    "CosineAnnealingWarmRestarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=11, eta_min=1e-5),
        pytest.approx(1.8, abs=0.1),
    ),
    "ReduceLROnPlateau": (
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=1e-6),
        pytest.approx(1.0, abs=0.6),
    ),
    "SWALR": (lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=5), 1.0),
    "MultiplicativeLR": (
        lambda o: lr_scheduler.MultiplicativeLR(o, [lambda _: 0.5, lambda _: 1.0]),
        pytest.approx(100 * 0.5**10),
    ),
    "LambdaLR": (
        lambda o: lr_scheduler.LambdaLR(o, [lambda _: 0.5, lambda _: 1.0]),
        pytest.approx(50.0),
    ),
    "SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, T_max=5, eta_min=1e-5)],
            milestones=[5],
        ),
        pytest.approx(1.0, rel=0.3),
    ),
}
KEEPS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, T_max=20)], milestones=[5]
    ),
}


@pytest.mark.parametrize("kind", FLATTENS)
def test_05_naive_scheduler_loses_the_ratio_of_two_groups(kind: str) -> None:
    make, ratio = FLATTENS[kind]
    found = ratio_after(make(two_rates()))
    assert found == (pytest.approx(ratio) if isinstance(ratio, float) else ratio)


def test_05_naive_cosine_floor_raises_a_group_that_lies_below_it() -> None:
    optimizer = two_rates()
    ratio_after(lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=1e-5))
    assert optimizer.param_groups[1]["lr"] > 4e-6


@pytest.mark.parametrize("kind", FLATTENS)
def test_05_check_scheduler_refuses_what_loses_ratios(kind: str) -> None:
    with pytest.raises(ConfigError, match=kind if kind != "SequentialLR" else "CosineAnnealingLR"):
        dist_layerlr.optim.check_scheduler(FLATTENS[kind][0](two_rates()))


@pytest.mark.parametrize("kind", KEEPS)
def test_05_check_scheduler_lets_through_what_keeps_ratios(kind: str) -> None:
    dist_layerlr.optim.check_scheduler(KEEPS[kind](two_rates()))
    assert ratio_after(KEEPS[kind](two_rates())) == pytest.approx(RATIO)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_05_plan_schedule_keeps_ratios_with_a_floor(kind: str) -> None:
    model = make_model()
    plan, optimizer = planned(model)
    schedule = dist_layerlr.Schedule(kind=kind, warmup_steps=2, total_steps=6, min_ratio=0.2)
    driver = dist_layerlr.PlanSchedule(optimizer, schedule)
    for _ in range(8):
        step_on_filled_grads(model, optimizer)
        driver.step()
        dist_layerlr.verify(plan, model, optimizer, factor=driver.factor)
    assert driver.factor == pytest.approx(1.0 if kind == "constant" else 0.2)


# --- 6: a load brings the old rates back ---


def test_06_naive_load_restores_the_old_rates_and_the_schedulers_old_base_rates() -> None:
    old, new = two_rates(), two_rates()
    for group in new.param_groups:
        group["lr"] *= 10
    before, after = (
        lr_scheduler.LambdaLR(old, lambda _: 1.0),
        lr_scheduler.LambdaLR(new, lambda _: 1.0),
    )
    assert after.base_lrs == pytest.approx([4e-3, 4e-5])
    new.load_state_dict(old.state_dict())
    assert [group["lr"] for group in new.param_groups] == [4e-4, 4e-6]
    after.load_state_dict(before.state_dict())
    assert after.base_lrs == [4e-4, 4e-6]
    assert [group["initial_lr"] for group in new.param_groups] == [4e-4, 4e-6]


def test_06_reapply_and_plan_schedule_keep_the_new_plan_through_a_load() -> None:
    schedule = dist_layerlr.Schedule(kind="linear", total_steps=5)
    model = make_model()
    _, old = planned(model)
    step_on_filled_grads(model, old)
    driver = dist_layerlr.PlanSchedule(old, schedule)
    driver.step()
    assert driver.state_dict().keys() == {"last_step"}
    plan, new = planned(
        model,
        config(component_lr={"self_attn": 1e-2, "ffn": 2e-2}, default_lr=3e-2, weight_decay=0.3),
    )
    new.load_state_dict(old.state_dict())
    resumed = dist_layerlr.PlanSchedule(new, schedule)
    resumed.load_state_dict(driver.state_dict())
    assert resumed.factor == 0.75
    with pytest.raises(PlanMismatch, match="lr"):
        dist_layerlr.verify(plan, model, new, factor=0.75)
    dist_layerlr.proof.reapply(plan, model, new, factor=0.75)
    dist_layerlr.verify(plan, model, new, factor=0.75)
    resumed.step()
    dist_layerlr.verify(plan, model, new, factor=0.5)


BACK_TO_OLD_RATES: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 - step / 20),
    "SequentialLR": KEEPS["SequentialLR"],
}


def resumed(kind: str) -> tuple[nn.Module, Any, Any, Any]:
    """A run under a changed plan that loaded the state of one under the old plan."""
    model = make_model()
    _, old = planned(model)
    before = BACK_TO_OLD_RATES[kind](old)
    changed = config(component_lr={"self_attn": 1e-2, "ffn": 2e-2}, default_lr=3e-2)
    plan, new = planned(model, changed)
    scheduler = BACK_TO_OLD_RATES[kind](new)
    new.load_state_dict(old.state_dict())
    scheduler.load_state_dict(before.state_dict())
    return model, plan, new, scheduler


@pytest.mark.parametrize("kind", BACK_TO_OLD_RATES)
def test_06_naive_scheduler_brings_the_old_rates_back_one_step_after_reapply(kind: str) -> None:
    model, plan, new, scheduler = resumed(kind)
    factor = new.param_groups[0]["lr"] / new.param_groups[0]["initial_lr"]
    dist_layerlr.proof.reapply(plan, model, new, factor=factor)
    dist_layerlr.verify(plan, model, new)
    if kind == "LambdaLR":  # the other multiplies live rates until its second part begins
        with pytest.raises(ConfigError, match="at step 1 it"):
            dist_layerlr.optim.check_scheduler(scheduler, steps=10)
        scheduler.step()
        with pytest.raises(PlanMismatch, match="planned lr"):
            dist_layerlr.verify(plan, model, new)


@pytest.mark.parametrize("kind", BACK_TO_OLD_RATES)
def test_06_reapply_gives_the_scheduler_the_rates_of_the_new_plan(kind: str) -> None:
    model, plan, new, scheduler = resumed(kind)
    factor = new.param_groups[0]["lr"] / new.param_groups[0]["initial_lr"]
    dist_layerlr.proof.reapply(plan, model, new, factor=factor, scheduler=scheduler)
    for _ in range(15):
        scheduler.step()
        dist_layerlr.verify(plan, model, new)
        assert scheduler.get_last_lr() == [group["lr"] for group in new.param_groups]


def test_06_reapply_refuses_a_scheduler_that_keeps_the_old_rates() -> None:
    model = make_model()
    plan, optimizer = planned(model)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=1e-4)
    with pytest.raises(ConfigError, match="at step 1 it does not keep"):
        dist_layerlr.proof.reapply(plan, model, optimizer, scheduler=scheduler)


# --- 16: stale group dicts ---


def test_16_naive_reference_to_a_group_goes_stale_on_load() -> None:
    model = make_model()
    optimizer = adamw(naive_groups(model.named_parameters()))
    held = optimizer.param_groups[0]
    optimizer.load_state_dict(optimizer.state_dict())
    held["lr"] = 0.0
    before = copy_of(model)
    step_on_filled_grads(model, optimizer)
    assert min(movement(before, copy_of(model)).values()) > 0.0


def test_16_plan_schedule_drives_the_live_groups_after_a_load() -> None:
    model = make_model()
    plan, optimizer = planned(model)
    driver = dist_layerlr.PlanSchedule(
        optimizer, dist_layerlr.Schedule(kind="linear", total_steps=3)
    )
    optimizer.load_state_dict(optimizer.state_dict())
    driver.step()
    dist_layerlr.verify(plan, model, optimizer, factor=0.5)
    fill_grads(model)
    with dist_layerlr.effect_check(plan, model, optimizer, factor=0.5) as observed:
        optimizer.step()
    assert observed == pytest.approx(
        {name: 0.5 * rate for name, rate in wanted_rates().items()}, rel=1e-2
    )
