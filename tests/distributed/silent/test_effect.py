"""The effect check sees what a step really did, under every sharder: it passes true optimizers and
names liars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import dist_layerlr
from dist_layerlr import ConfigError, PlanMismatch, effect_check, plan_model
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import SHARDERS, Native, Zero, fsdp2, start_deepspeed
from tests.support.parity import Recipe, batch, micro_batches

cases = Cases(before=start_deepspeed)
FACTOR = 0.5
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda g: torch.optim.AdamW(g, lr=1.0, weight_decay=0.1, foreach=False),
    "adamw fused": lambda g: torch.optim.AdamW(g, lr=1.0, weight_decay=0.1, fused=True),
    "adamw amsgrad": lambda g: torch.optim.AdamW(g, lr=1.0, weight_decay=0.1, amsgrad=True),
    "adam": lambda g: torch.optim.Adam(g, lr=1.0, weight_decay=0.1),
    "sgd": lambda g: torch.optim.SGD(g, lr=1.0, weight_decay=0.1),
    "sgd with momentum": lambda g: torch.optim.SGD(g, lr=1.0, momentum=0.9, weight_decay=0.1),
}
UNKNOWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "nadam": lambda g: torch.optim.NAdam(g, lr=1.0),
    "radam": lambda g: torch.optim.RAdam(g, lr=1.0),
    "nesterov": lambda g: torch.optim.SGD(g, lr=1.0, momentum=0.9, nesterov=True),
    "adamw that climbs": lambda g: torch.optim.AdamW(g, lr=1.0, maximize=True),
}


class Liar(torch.optim.AdamW):
    """Reports the rate of its first group, and steps it at three times that."""

    lies = True

    def step(self, closure: Any = None) -> Any:
        if not self.lies:
            return super().step(closure)
        group = self.param_groups[0]
        reported, group["lr"] = group["lr"], group["lr"] * 3.0
        try:
            return super().step(closure)
        finally:
            group["lr"] = reported


class LateLiar(Liar):
    """Is honest until somebody changes it, as patches of an optimizer do."""

    lies = False


class Made(Recipe):
    """The recipe with an optimizer of the test's own."""

    build: Callable[[Any], torch.optim.Optimizer]

    def make(self, groups: Any) -> torch.optim.Optimizer:
        return self.build(groups)


def recipe(build: Callable[[Any], torch.optim.Optimizer], emission: str = "auto") -> Recipe:
    made = Made(emission=emission)
    object.__setattr__(made, "build", build)
    return made


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def drivers(
    build: Callable[[Any], torch.optim.Optimizer],
    emission: str = "auto",
    only: tuple[str, ...] = (),
) -> dict[str, Callable[[], Any]]:
    """{sharder: how to build its driver}."""
    made = recipe(build, emission)
    wraps = {"unsharded": lambda model: model, **SHARDERS}
    native = {name: (lambda wrap=wrap: Native(wrap, made)) for name, wrap in wraps.items()}
    found = {**native, **{f"zero {s}": (lambda s=s: Zero(made, s)) for s in range(4)}}
    return {name: make for name, make in found.items() if not only or name in only}


def observed(driver: Any, steps: int = 2) -> dict[str, float]:
    """Rates of the last step at a factor, over all ranks; the steps before it fill the optimizer's
    state."""
    live = driver.optimizer if driver.optimizer is not None else driver.model.optimizer
    dist_layerlr.optim.scale_lrs(live, FACTOR)
    for step in range(steps):
        for x, y in micro_batches(step, 1):
            loss = F.mse_loss(driver.model(x), y)
        if driver.optimizer is None:
            driver.model.backward(loss)
        else:
            driver.backward(loss)
        with effect_check(driver.plan, driver.model, driver.optimizer, factor=FACTOR) as rates:
            driver.model.step() if driver.optimizer is None else driver.step()
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, rates)
    return {name: rate for one in heard for name, rate in one.items()}


def passes(
    name: str, emission: str = "auto", only: tuple[str, ...] = ()
) -> Callable[[Outcomes], None]:
    """A test that every rate is observed, and right."""

    def body(at: At) -> None:
        for sharder, make in drivers(OPTIMIZERS[name], emission, only).items():
            driver = make()
            rates = observed(driver)
            wanted = {
                name: pytest.approx(entry.lr * FACTOR, rel=0.02)
                for name, entry in driver.plan.entries.items()
            }
            assert rates == wanted, sharder

    body.__name__ = f"test_it_sees_the_planned_rates_of_{name.replace(' ', '_')}_{emission}"
    return cases(body)


A_FEW = ("unsharded", "fsdp1_flat", "zero 2")
test_it_sees_the_planned_rates_of_adamw_auto = passes("adamw")
test_it_sees_the_planned_rates_of_sgd_auto = passes("sgd")
test_it_sees_the_planned_rates_of_sgd_with_momentum_auto = passes("sgd with momentum")
test_it_sees_the_planned_rates_of_adamw_fused_auto = passes(
    "adamw fused", only=("fsdp1", "fsdp2", "zero 1", "zero 3")
)
test_it_sees_the_planned_rates_of_adamw_amsgrad_auto = passes("adamw amsgrad", only=A_FEW)
test_it_sees_the_planned_rates_of_adam_auto = passes("adam", only=A_FEW)
test_it_sees_the_planned_rates_of_adamw_segmented = passes("adamw", "segmented")
test_it_sees_the_planned_rates_of_sgd_segmented = passes("sgd", "segmented", A_FEW)


@cases
def test_it_says_so_where_the_direction_is_unknown(at: At) -> None:
    for build in UNKNOWN.values():
        for wrap in (SHARDERS["ddp"], fsdp2):
            with pytest.raises(PlanMismatch, match=r"no step was seen of any of \d+ planned"):
                observed(Native(wrap, recipe(build)))


@cases
def test_a_model_that_was_frozen_after_attach_is_no_proof(at: At) -> None:
    for make in drivers(OPTIMIZERS["adamw"], only=("unsharded", "ddp", "fsdp2")).values():
        driver = make()
        with pytest.raises(PlanMismatch, match="no step was seen of any"):
            with effect_check(driver.plan, driver.model, driver.optimizer):
                driver.optimizer.step()


@cases
def test_pure_bf16_weights_are_compared_in_their_own_precision(at: At) -> None:
    model = Recipe().model().bfloat16()
    plan = plan_model(model, {"learning_rate": 3e-3, "per_layer_lr": {"enabled": False}})
    optimizer = dist_layerlr.attach(plan, model, lambda g: torch.optim.AdamW(g, lr=1.0))
    for step in range(2):
        x, y = batch(step)
        optimizer.zero_grad()
        F.mse_loss(model(x.bfloat16()), y.bfloat16()).backward()
        with effect_check(plan, model, optimizer) as rates:
            optimizer.step()
    assert rates


@cases
def test_it_names_a_parameter_that_moves_at_another_rate_than_reported(at: At) -> None:
    for emission, only in (("auto", ()), ("segmented", ("ddp", "zero 2"))):
        for sharder, make in drivers(lambda g: LateLiar(g, lr=1.0), emission, only).items():
            driver = make()
            first = driver.plan.groups[0]
            LateLiar.lies = True
            try:
                with pytest.raises(PlanMismatch) as error:
                    observed(driver)
            finally:
                LateLiar.lies = False
            wanted, real = first.lr * FACTOR, 3 * first.lr * FACTOR
            assert f"planned lr {wanted:.6g}, the step moved it at {real:.3g}"[:-1] in str(
                error.value
            ), sharder
            assert any(f"{name}: planned" in str(error.value) for name in first.names)
            assert "does not use its groups' rates" in str(error.value)


@cases
def test_one_that_lies_from_the_start_is_refused_before_it_trains(at: At) -> None:
    for make in drivers(lambda g: Liar(g, lr=1.0), only=A_FEW).values():
        with pytest.raises((ConfigError, PlanMismatch), match="Liar.* times as far"):
            driver = make()
            dist_layerlr.verify(driver.plan, driver.model, driver.optimizer)


@cases
def test_it_names_what_a_stale_optimizer_does_not_step(at: At) -> None:
    model: nn.Module = Recipe().model()
    plan = plan_model(model, Recipe().config)
    optimizer = torch.optim.AdamW(dist_layerlr.optim.param_groups(plan, model))
    sharded = fsdp2(model)
    x, y = batch(0)
    F.mse_loss(sharded(x), y).backward()
    with pytest.raises(PlanMismatch, match="patch.weight: not stepped by the optimizer"):
        with effect_check(plan, sharded, optimizer):
            optimizer.step()


@cases
def test_an_error_inside_the_step_passes_unchanged(at: At) -> None:
    driver = Native(SHARDERS["ddp"], replace(Recipe()))
    with (
        pytest.raises(ZeroDivisionError),
        effect_check(driver.plan, driver.model, driver.optimizer),
    ):
        raise ZeroDivisionError
