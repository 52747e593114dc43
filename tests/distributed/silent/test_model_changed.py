"""``verify`` compares with what the model trains now, and with how often steps were counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_layerlr import attach, plan_model, save_checkpoint, verify
from dist_layerlr.errors import ConfigError, PlanMismatch
from dist_layerlr.optim import optimizer_state
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import SHARDERS, Native, Zero, ds_config, start_deepspeed
from tests.support.parity import Recipe, batch, micro_batches

cases = Cases(before=start_deepspeed)
RECIPE = Recipe()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def drivers(*zero: int) -> dict[str, Callable[[], Any]]:
    """{sharder: how to build its driver}."""
    wraps: dict[str, Any] = {"unsharded": lambda model: model, **SHARDERS}
    found = {name: (lambda wrap=wrap: Native(wrap, RECIPE)) for name, wrap in wraps.items()}
    return {**found, **{f"zero {s}": (lambda s=s: Zero(RECIPE, s)) for s in zero}}


def proven(driver: Any, **how: Any) -> Any:
    return verify(driver.plan, driver.model, driver.optimizer, **how)


@cases
def test_a_parameter_that_was_frozen_after_attach_is_named(at: At) -> None:
    for sharder, make in drivers(2, 3).items():
        driver = make()
        proven(driver)
        driver.model.requires_grad_(False)
        with pytest.raises(PlanMismatch) as error:
            proven(driver)
        assert "patch.weight: planned, but it requires no gradient" in str(error.value), sharder
        assert "requires_grad was changed after attach" in str(error.value), sharder


@cases
def test_a_module_that_was_added_or_removed_after_attach_is_named(at: At) -> None:
    for sharder in ("unsharded", "ddp", "fsdp2"):
        driver = drivers()[sharder]()
        inner = getattr(driver.model, "module", driver.model)
        inner.late = nn.Linear(2, 2)
        with pytest.raises(PlanMismatch, match=r"late\.weight: requires a gradient, but is not in"):
            proven(driver)
        del inner.late, inner.gate
        with pytest.raises(PlanMismatch, match="gate: planned, but no parameter of the model any"):
            proven(driver)


@cases
def test_another_adapter_of_peft_is_named_with_its_cause(at: At) -> None:
    recipe = Recipe(lora=True)
    model: Any = recipe.model()
    plan = plan_model(model, recipe.config)
    optimizer = attach(plan, model, recipe.make)
    verify(plan, model, optimizer)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["to_q"]))
    model.set_adapter("second")
    with pytest.raises(PlanMismatch) as error:
        verify(plan, model, optimizer)
    assert "lora_A.default.weight: planned, but it requires no gradient" in str(error.value)
    assert "set_adapter" in str(error.value)


@cases
def test_parameters_unfrozen_after_the_plan_are_named(at: At) -> None:
    driver = drivers()["ddp"]()
    driver.model.module.still.requires_grad_(True)
    with pytest.raises(PlanMismatch, match=r"still\.weight: requires a gradient, but is not in"):
        proven(driver)


def stepped(driver: Any) -> None:
    for x, y in micro_batches(0, 1):
        driver.backward(F.mse_loss(driver.model(x), y))
    driver.step()


@cases
def test_a_step_that_was_counted_twice_is_found(at: At) -> None:
    found = drivers(0, 1, 3)
    del found["unsharded"]  # each rank would train a model of its own, which is found, too
    for sharder, make in found.items():
        driver = make()
        proven(driver, deep=True, steps=0)
        stepped(driver)
        proven(driver, deep=True, steps=1)
        with pytest.raises(PlanMismatch, match="1 steps counted, 0 done"):
            proven(driver, deep=True, steps=0)
        assert proven(driver, deep=True).elements, sharder


@cases
def test_names_that_are_ahead_of_the_steps_done_are_named(at: At) -> None:
    driver = drivers()["ddp"]()
    stepped(driver)
    counter = optimizer_state(driver.model, driver.optimizer)["gate"][0].tensors["step"]
    counter.add_(1)
    with pytest.raises(PlanMismatch, match="gate: 2 steps counted, 1 done"):
        proven(driver, deep=True, steps=1)
    proven(driver, deep=True)  # it may have been trained before the others were
    counter.sub_(1 + at.rank)
    with pytest.raises(PlanMismatch, match="gate: 0 steps counted on rank 1, 1 on rank 0"):
        proven(driver, deep=True)


@cases
def test_a_name_without_a_gradient_is_behind_and_in_order(at: At) -> None:
    model = RECIPE.model()
    plan = plan_model(model, RECIPE.config)
    optimizer = attach(plan, model, RECIPE.make)
    for step in range(2):
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        if step == 0:
            model.get_parameter("gate").grad = None
        optimizer.step()
    verify(plan, model, optimizer, deep=True, steps=2)


def engine_of(stage: int, **fields: Any) -> tuple[Any, Any]:
    """(plan, engine), from a config that nobody has checked."""
    import deepspeed

    config = ds_config(stage, RECIPE)
    config["zero_optimization"].update(fields.pop("zero", {}))
    config.update(fields)
    model = RECIPE.model()
    plan = plan_model(model, RECIPE.config)
    optimizer = attach(plan, model, RECIPE.make)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return plan, engine


@cases
def test_round_robin_gradients_are_read_from_the_live_engine(at: At) -> None:
    for stage in (1, 2):
        plan, engine = engine_of(stage, zero={"round_robin_gradients": True})
        with pytest.raises(ConfigError, match="round_robin_gradients=true"):
            verify(plan, engine)
        with pytest.raises(ConfigError, match="round_robin_gradients=true"):
            save_checkpoint(at.folder, plan, engine, step=1)
    verify(*engine_of(3, zero={"round_robin_gradients": True}))


@cases
def test_zenflow_and_autotp_are_read_from_the_live_engine(at: At) -> None:
    # Both need a machine that DeepSpeed can compile for, or a model of transformers: the engine is
    # real, what they would have left on it is set by hand.
    plan, engine = engine_of(2)
    engine.zenflow = True
    with pytest.raises(ConfigError, match="zenflow"):
        verify(plan, engine)
    engine.zenflow = False
    engine._config.tensor_parallel_config.autotp_size = 2
    with pytest.raises(ConfigError, match="autotp_size=2"):
        verify(plan, engine)
    engine._config.tensor_parallel_config.autotp_size = 0
    verify(plan, engine)


@cases
def test_a_pipeline_module_is_refused(at: At) -> None:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    torch.manual_seed(0)
    model = PipelineModule([nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=2, loss_fn=F.mse_loss)
    plan = plan_model(model, RECIPE.config)
    config = {**ds_config(1, RECIPE), "zero_optimization": {"stage": 0}}
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with pytest.raises((ConfigError, PlanMismatch), match="PipelineModule|plans differ"):
        verify(plan, engine)
