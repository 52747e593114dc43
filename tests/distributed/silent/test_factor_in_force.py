"""`verify` and `effect_check` without a factor: the multiplier is read off the live groups.

What one multiplier cannot explain is refused. Beside it: DeepSpeed in one call, and FSDP2 at a
moment when it shows gathered parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import dist_layerlr
from dist_layerlr import PlanMismatch, PlanSchedule, Schedule, effect_check, verify
from dist_layerlr.optim import scale_lrs
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import SHARDERS, Native, Zero, ds_config, fsdp2, start_deepspeed
from tests.support.parity import Recipe, batch, micro_batches

cases = Cases(before=start_deepspeed)
RECIPE = Recipe()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def every_driver() -> dict[str, Any]:
    made = {name: Native(wrap, RECIPE) for name, wrap in SHARDERS.items()}
    return {"none": Native(lambda model: model, RECIPE), **made}


@cases
def test_the_multiplier_of_a_schedule_is_read_and_said_under_every_sharder(at: At) -> None:
    for name, driver in every_driver().items():
        schedule = PlanSchedule(driver.optimizer, Schedule(kind="linear", total_steps=5))
        assert verify(driver.plan, driver.model, driver.optimizer).step_factor == 1.0, name
        schedule.step()
        proof = verify(driver.plan, driver.model, driver.optimizer)
        assert proof.step_factor == pytest.approx(schedule.factor) == 0.75, name
        assert "at its planned learning rate x 0.75 (schedule)" in proof.line(), name


@cases
def test_a_multiplier_that_was_asked_for_must_be_the_one_in_force(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    scale_lrs(driver.optimizer, 0.5)
    assert verify(driver.plan, driver.model, driver.optimizer, factor=0.5).step_factor == 0.5
    with pytest.raises(PlanMismatch, match="planned lr"):
        verify(driver.plan, driver.model, driver.optimizer, factor=1.0)


@cases
def test_rates_that_one_multiplier_cannot_explain_are_named(at: At) -> None:
    driver = Native(lambda model: model, RECIPE)
    groups = driver.optimizer.param_groups
    assert len(groups) > 2
    groups[0]["lr"] *= 0.5
    with pytest.raises(PlanMismatch, match="planned lr"):
        verify(driver.plan, driver.model, driver.optimizer)


@cases
def test_groups_whose_initial_rate_is_not_the_plans_are_refused(at: At) -> None:
    driver = Native(lambda model: model, RECIPE)
    for group in driver.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 0.5 * group["initial_lr"]
    with pytest.raises(PlanMismatch, match="planned lr"):
        verify(driver.plan, driver.model, driver.optimizer)


@cases
def test_rates_above_the_plan_are_no_schedule(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    scale_lrs(driver.optimizer, 10.0)
    with pytest.raises(PlanMismatch, match="10 x their initial_lr"):
        verify(driver.plan, driver.model, driver.optimizer)
    assert verify(driver.plan, driver.model, driver.optimizer, factor=10.0).step_factor == 10.0


@cases
def test_a_schedule_that_one_rank_alone_has_stepped_is_refused_on_all(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    scale_lrs(driver.optimizer, 0.5 if at.rank else 1.0)
    with pytest.raises(PlanMismatch, match=r"on rank 1.*\n.*0.5 x the plan, on rank 0 at 1 x"):
        verify(driver.plan, driver.model, driver.optimizer)


@cases
def test_every_step_of_a_warmup_is_read_exactly(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    for steps in (6, 7, 13):
        warmup = Schedule(kind="cosine", warmup_steps=steps, total_steps=3 * steps)
        schedule = PlanSchedule(driver.optimizer, warmup)
        for _ in range(2 * steps):
            proof = verify(driver.plan, driver.model, driver.optimizer)
            assert proof.step_factor == pytest.approx(schedule.factor, rel=1e-12)
            schedule.step()


@cases
def test_a_multiplier_of_zero_or_below_hides_no_wrong_rate(at: At) -> None:
    driver = Native(lambda model: model, RECIPE)
    scale_lrs(driver.optimizer, 0.0)
    assert verify(driver.plan, driver.model, driver.optimizer).step_factor == 0.0
    driver.optimizer.param_groups[0]["initial_lr"] *= 2.0
    with pytest.raises(PlanMismatch, match="a schedule multiplies"):
        verify(driver.plan, driver.model, driver.optimizer)
    driver.optimizer.param_groups[0]["initial_lr"] /= 2.0
    scale_lrs(driver.optimizer, -0.5)
    with pytest.raises(PlanMismatch, match="-0.5 x their initial_lr"):
        verify(driver.plan, driver.model, driver.optimizer)


@cases
def test_the_effect_check_reads_the_multiplier_too(at: At) -> None:
    driver = Native(fsdp2, RECIPE)
    scale_lrs(driver.optimizer, 0.25)
    for inputs, target in micro_batches(0, 1):
        F.mse_loss(driver.model(inputs), target).backward()
    with effect_check(driver.plan, driver.model, driver.optimizer) as observed:
        driver.optimizer.step()
    for name, rate in observed.items():
        assert rate == pytest.approx(driver.plan.entries[name].lr * 0.25, rel=0.02)
    assert observed


@cases
def test_deepspeed_in_one_call_trains_as_the_four_calls_do(at: At) -> None:
    """Stage 2: the same steps end in the same bits."""
    apart = Zero(replace(RECIPE, emission="segmented"), 2)
    plan = apart.plan
    model = RECIPE.model()
    config = ds_config(2, RECIPE)
    engine, optimizer, _, _ = dist_layerlr.initialize_deepspeed(plan, model, RECIPE.make, config)
    assert verify(plan, engine).sharder == "zero 2"
    assert len(optimizer.param_groups) == 1, "DeepSpeed sees one group"
    for _ in range(2):
        for inputs, target in micro_batches(0, 1):
            for one in (apart.model, engine):
                one.backward(F.mse_loss(one(inputs), target))
                one.step()
    pairs = zip(apart.model.module.parameters(), engine.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@cases
def test_a_ds_config_that_takes_the_rates_over_is_refused_before_anything_is_built(at: At) -> None:
    config = {**ds_config(2, RECIPE), "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    model = RECIPE.model()
    plan = dist_layerlr.plan_model(model, RECIPE.config)
    with pytest.raises(dist_layerlr.ConfigError, match="'optimizer' block 'AdamW'"):
        dist_layerlr.initialize_deepspeed(plan, model, RECIPE.make, config)


def without_backward(model: Any) -> None:
    """An evaluation before training: FSDP2 leaves what it gathered until a backward comes."""
    with torch.no_grad():
        model(batch(0)[0])
    model(batch(0)[0])


@cases
def test_naive_an_optimizer_made_after_an_evaluation_holds_gathered_tensors(at: At) -> None:
    model = fsdp2(RECIPE.model())
    sharded = {name: id(p) for name, p in model.named_parameters()}
    without_backward(model)
    gathered = [name for name, p in model.named_parameters() if id(p) != sharded[name]]
    assert gathered, "the root, at least, shows plain parameters that nobody trains"


@cases
def test_fsdp2_is_attached_proven_clipped_and_read_after_an_evaluation(at: At) -> None:
    # By default the root stays gathered; with False every unit does.
    for policy in ({}, {"reshard_after_forward": False}):
        model = RECIPE.model()
        plan = dist_layerlr.plan_model(model, RECIPE.config)
        model = fsdp2(model, **policy)
        without_backward(model)
        optimizer = dist_layerlr.attach(plan, model, RECIPE.make)
        without_backward(model)
        assert verify(plan, model, optimizer).parameters == len(plan.entries)
        before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
        F.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
        without_backward(model)
        assert dist_layerlr.clip_grad_norm(model, float("inf")) > 0.0
        without_backward(model)
        with effect_check(plan, model, optimizer) as observed:
            optimizer.step()
        assert observed
        moved = {
            n for n, p in model.named_parameters() if not torch.equal(p.full_tensor(), before[n])
        }
        assert moved == plan.entries.keys()
        dist.barrier()
