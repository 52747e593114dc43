"""A fault on one rank ends all ranks with the same error, soon; none hangs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

import dist_layerlr
from dist_layerlr.errors import ConfigError, LayerLRError, PlanMismatch
from dist_layerlr.sharders.plain import PlainSharder
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import SHARDERS, Native, Zero, fsdp2, start_deepspeed
from tests.support.parity import LAYERED, Recipe
from tests.support.ranks import GROUP_TIMEOUT_S

SOON_S = 0.8 * GROUP_TIMEOUT_S
"""Before a collective that waits for a rank which never comes would end."""
cases = Cases(before=start_deepspeed)
RECIPE = Recipe()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def raised_alike(work: Callable[[], object]) -> BaseException:
    """What every rank raised; fails unless it is the same error everywhere, in time."""
    start = time.monotonic()
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    mine = (type(error).__name__, str(error))
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, mine)
    assert error is not None and all(other == mine for other in heard), heard
    assert time.monotonic() - start < SOON_S
    return error


def drivers() -> dict[str, Callable[[], Any]]:
    native = {name: (lambda wrap=wrap: Native(wrap, RECIPE)) for name, wrap in SHARDERS.items()}
    return {**native, **{f"zero {s}": (lambda s=s: Zero(RECIPE, s)) for s in range(4)}}


def live_groups(driver: Any) -> list[dict[str, Any]]:
    return (driver.optimizer or driver.model.optimizer).param_groups


def verify(driver: Any) -> object:
    return dist_layerlr.verify(driver.plan, driver.model, driver.optimizer)


def other_plan() -> dist_layerlr.Plan:
    return dist_layerlr.plan_model(
        RECIPE.model(), {"per_layer_lr": {**LAYERED, "default_lr": 1e-5}}
    )


def for_every_sharder(check: Callable[[At, Any], None]) -> Callable[[Outcomes], None]:
    """One case per sharder in one test."""

    def body(at: At) -> None:
        for name, build in drivers().items():
            try:
                check(at, build())
            except Exception as error:
                raise AssertionError(f"under {name}") from error

    body.__name__ = check.__name__
    return cases(body)


@for_every_sharder
def test_a_plan_that_differs_on_one_rank_ends_verify_everywhere(at: At, driver: Any) -> None:
    if at.rank == 1:
        driver.plan = other_plan()
    error = raised_alike(lambda: verify(driver))
    assert isinstance(error, PlanMismatch) and "plans differ between ranks" in str(error)


@for_every_sharder
def test_a_rate_changed_on_one_rank_ends_verify_everywhere(at: At, driver: Any) -> None:
    name = next(iter(driver.plan.groups[0].names))
    if at.rank == 1:
        live_groups(driver)[0]["lr"] *= 2
    error = raised_alike(lambda: verify(driver))
    assert (
        isinstance(error, PlanMismatch)
        and "on rank 1" in str(error)
        and f"{name}: planned lr" in str(error)
    )


@cases
def test_a_group_missing_on_one_rank_ends_verify_everywhere(at: At) -> None:
    for wrap in SHARDERS.values():
        driver = Native(wrap, RECIPE)
        lost = driver.plan.groups[-1].names[0]
        if at.rank == 1:
            stepping = getattr(
                driver.optimizer, "inner", driver.optimizer
            )  # flat FSDP1 steps views of one group
            stepping.param_groups.pop()
        error = raised_alike(lambda d=driver: verify(d))
        assert isinstance(error, PlanMismatch) and "on rank 1" in str(error)
        assert f"{lost}: not stepped by the optimizer" in str(error)


@for_every_sharder
def test_an_exception_while_reading_one_rank_ends_verify_everywhere(at: At, driver: Any) -> None:
    if at.rank == 1:
        del live_groups(driver)[0]["lr"]
    error = raised_alike(lambda: verify(driver))
    assert isinstance(error, PlanMismatch)
    assert re.search(r"on rank 1.*\n.*KeyError: 'lr'", str(error))


@cases
def test_a_plan_that_differs_on_one_rank_ends_attach_everywhere(at: At) -> None:
    for wrap in SHARDERS.values():
        plan = (
            other_plan() if at.rank == 1 else dist_layerlr.plan_model(RECIPE.model(), RECIPE.config)
        )
        model = wrap(RECIPE.model())
        error = raised_alike(lambda p=plan, m=model: dist_layerlr.attach(p, m, RECIPE.make))
        assert isinstance(error, PlanMismatch) and "plans differ between ranks" in str(error)


@cases
def test_a_parameter_missing_on_one_rank_ends_attach_everywhere(at: At) -> None:
    plan = dist_layerlr.plan_model(RECIPE.model(), RECIPE.config)
    for wrap in (lambda m: m, fsdp2):
        model = wrap(RECIPE.model())
        if at.rank == 1:
            model.gate.requires_grad_(False)
        error = raised_alike(lambda m=model: dist_layerlr.attach(plan, m, RECIPE.make))
        assert isinstance(error, PlanMismatch)
        assert re.search(
            r"on rank 1.*\n.*PlanMismatch: .*'gate'.*the model does not train", str(error)
        )


@cases
def test_an_exception_in_make_on_one_rank_ends_attach_everywhere(at: At) -> None:
    for kind in (RuntimeError, ConfigError, KeyError):
        for wrap in SHARDERS.values():
            model = wrap(RECIPE.model())
            plan = dist_layerlr.plan_model(RECIPE.model(), RECIPE.config)

            def make(groups: Any, kind: type[Exception] = kind) -> torch.optim.Optimizer:
                if at.rank == 1:
                    raise kind("no fused kernel here")
                return RECIPE.make(groups)

            error = raised_alike(lambda p=plan, m=model, f=make: dist_layerlr.attach(p, m, f))
            assert isinstance(error, PlanMismatch) and "on rank 1" in str(error)
            assert kind.__name__ in str(error) and "no fused kernel here" in str(error)
            assert (type(error.__cause__) is kind) == (at.rank == 1)


@cases
def test_an_exception_that_all_ranks_raise_alike_passes_attach_unchanged(at: At) -> None:
    def make(groups: Any) -> NoReturn:
        raise LayerLRError("no optimizer of that name")

    plan = dist_layerlr.plan_model(RECIPE.model(), RECIPE.config)
    error = raised_alike(lambda: dist_layerlr.attach(plan, RECIPE.model(), make))
    assert type(error) is LayerLRError and str(error) == "no optimizer of that name"


@cases
def test_an_exception_on_one_rank_ends_reapply_and_check_manifest_everywhere(at: At) -> None:
    driver = Native(lambda m: m, RECIPE)
    saved = dist_layerlr.proof.manifest(driver.plan, driver.model, driver.optimizer)
    original = PlainSharder.pieces

    def broken(*_: Any) -> NoReturn:
        raise ZeroDivisionError("rank 1 only")

    if at.rank == 1:
        PlainSharder.pieces = broken  # type: ignore[method-assign]
    try:
        for work in (
            dist_layerlr.proof.reapply,
            lambda *of: dist_layerlr.proof.check_manifest(saved, *of),
        ):
            error = raised_alike(lambda w=work: w(driver.plan, driver.model, driver.optimizer))
            assert isinstance(error, PlanMismatch) and "ZeroDivisionError: rank 1 only" in str(
                error
            )
    finally:
        PlainSharder.pieces = original  # type: ignore[method-assign]


@cases
def test_another_checkpoint_layout_on_one_rank_ends_check_manifest_everywhere(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    saved = dist_layerlr.proof.manifest(driver.plan, driver.model, driver.optimizer)
    if at.rank == 1:
        saved["groups"].reverse()
    error = raised_alike(
        lambda: dist_layerlr.proof.check_manifest(
            saved, driver.plan, driver.model, driver.optimizer
        )
    )
    assert isinstance(error, PlanMismatch) and "on rank 1" in str(error)


@cases
def test_a_rate_that_one_rank_does_not_use_ends_effect_check_everywhere(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    driver.backward(driver.model(torch.ones(2, 7)).square().mean())

    def step() -> None:
        with dist_layerlr.effect_check(driver.plan, driver.model, driver.optimizer):
            group = driver.optimizer.param_groups[0]
            group["lr"] *= 2.0 if at.rank == 1 else 1.0
            driver.optimizer.step()

    error = raised_alike(step)
    assert (
        isinstance(error, PlanMismatch)
        and "on rank 1" in str(error)
        and "the step moved it at" in str(error)
    )
