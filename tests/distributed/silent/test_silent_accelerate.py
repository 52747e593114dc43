"""Silent failures of Accelerate on CPU ranks: each shown on naive code, then with ours.

Numbers in the names are the rows of the table of 22 silent failures. The first test of a row
asserts that naive code still fails without an error: when it no longer passes, upstream mended it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, DummyOptim, DummyScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.naive import (
    CONFIG,
    RATES,
    adamw,
    backward,
    batch,
    config,
    make_model,
    naive_groups,
)
from tests.support.toys import Block


def quiet() -> None:
    """Start DeepSpeed on the ranks' process group, without compiling its shared memory op; be a
    torchrun."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"]
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", verbose=False)


cases = Cases(before=quiet)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


@contextmanager
def fresh_state() -> Iterator[None]:
    """Accelerate keeps its state in singletons."""

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    try:
        yield
    finally:
        reset()


def fsdp2_plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Block.__name__],
    )


def fsdp2_accelerator() -> Accelerator:
    """Accelerate ignores the plugin on CPU, so its state is written by hand."""
    plugin = fsdp2_plugin()
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def zero_config(stage: int, **fields: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **fields,
    }


def zero_accelerator(at: At, settings: dict[str, Any]) -> Accelerator:
    """Accelerate counts one process on CPU, so its state is written by hand."""
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state.update(
            num_processes=at.world_size, process_index=at.rank, local_process_index=at.rank
        )
    return accelerator


def zero_step(engine: Any, at: At, step: int = 0) -> None:
    x, y = batch(step, at.rank)
    engine.backward(F.mse_loss(engine(x), y))
    engine.step()


def names_of(optimizer: Any, model: nn.Module) -> list[str]:
    """Name of each tensor that the optimizer steps, with repetitions."""
    names = {id(param): name for name, param in model.named_parameters()}
    return [names[id(param)] for group in optimizer.param_groups for param in group["params"]]


# --- 1: parameters matched by address ---


def with_shared_address() -> nn.Module:
    """Two parameters, one memory: a tie that `named_parameters` does not see."""
    model = make_model()
    model.blocks[0].attn.to_k.weight.data = model.blocks[1].attn.to_k.weight.data
    return model


@cases
def test_01_naive_prepare_for_fsdp2_drops_one_of_two_parameters_at_one_address(at: At) -> None:
    with fresh_state():
        model = with_shared_address()
        model, optimizer = fsdp2_accelerator().prepare(
            model, adamw(naive_groups(model.named_parameters()))
        )
        stepped = names_of(optimizer, model)
        assert len(stepped) == len(set(stepped)) + 1
        assert {name for name, _ in model.named_parameters()} - set(stepped) == {
            "blocks.0.attn.to_k.weight"
        }


@cases
def test_01_verify_names_the_parameter_that_prepare_dropped(at: At) -> None:
    with fresh_state():
        model = with_shared_address()
        plan = dist_layerlr.plan_model(model, CONFIG)
        model, optimizer = fsdp2_accelerator().prepare(
            model, dist_layerlr.attach(plan, model, adamw)
        )
        with pytest.raises(PlanMismatch, match=r"blocks\.0\.attn\.to_k\.weight"):
            dist_layerlr.verify(plan, model, optimizer)
        optimizer = dist_layerlr.attach(plan, model, adamw)
        dist_layerlr.verify(plan, model, optimizer)


@cases
def test_01_verify_holds_through_prepare(at: At) -> None:
    with fresh_state():
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        model, optimizer = fsdp2_accelerator().prepare(
            model, dist_layerlr.attach(plan, model, adamw)
        )
        assert dist_layerlr.verify(plan, model, optimizer).sharder == "fsdp2"
    for stage in (1, 2, 3):
        with fresh_state():
            model = make_model()
            plan = dist_layerlr.plan_model(model, CONFIG)
            accelerator = zero_accelerator(at, zero_config(stage))
            engine, _ = accelerator.prepare(model, dist_layerlr.attach(plan, model, adamw))
            assert dist_layerlr.verify(plan, engine).sharder == f"zero {stage}"


# --- 5: "auto" takes one scalar for all groups ---

AUTO = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
AUTO_ADAMW = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}


@cases
def test_05_naive_auto_scheduler_drives_all_groups_to_the_dummy_rate(at: At) -> None:
    with fresh_state():
        accelerator = zero_accelerator(at, zero_config(1, scheduler=AUTO, optimizer=AUTO_ADAMW))
        model = make_model()
        dummy = DummyOptim(naive_groups(model.named_parameters()), lr=1.0, weight_decay=0.0)
        engine, _, _ = accelerator.prepare(model, dummy, DummyScheduler(dummy, warmup_num_steps=2))
        for step in range(4):
            zero_step(engine, at, step)
        assert [group["lr"] for group in engine.optimizer.param_groups] == [1.0] * 3


@cases
def test_05_auto_blocks_are_refused_by_name(at: At) -> None:
    with pytest.raises(ConfigError, match="WarmupLR"):
        dist_layerlr.optim.check_ds_config(zero_config(1, scheduler=AUTO))
    with pytest.raises(ConfigError, match="AdamW"):
        dist_layerlr.optim.check_ds_config(zero_config(1, optimizer=AUTO_ADAMW))


# --- 7: a plugin that is not used ---

SEES_ALL = tuple(map(int, accelerate.__version__.split(".")[:2])) < (1, 13)
"""Before 1.13 Accelerate's DeepSpeed plugin knew of all processes on CPUs."""


@cases
def test_07_naive_fsdp_plugin_on_cpu_is_dropped_for_ddp(at: At) -> None:
    with fresh_state():
        accelerator = Accelerator(cpu=True, fsdp_plugin=fsdp2_plugin())
        model = make_model()
        model, _ = accelerator.prepare(model, adamw(naive_groups(model.named_parameters())))
        assert isinstance(model, DDP)


@cases
def test_07_naive_deepspeed_plugin_on_cpu_believes_in_one_process(at: At) -> None:
    with fresh_state():
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero_config(1)))
        believed = (2, at.rank) if SEES_ALL else (1, 0)
        assert (accelerator.num_processes, accelerator.process_index) == believed
        assert (dist.get_world_size(), dist.get_rank()) == (2, at.rank)


@cases
def test_07_check_sharding_says_what_wraps_the_model_instead(at: At) -> None:
    with fresh_state():
        accelerator = Accelerator(cpu=True, fsdp_plugin=fsdp2_plugin())
        model = make_model()
        model, _ = accelerator.prepare(model, adamw(naive_groups(model.named_parameters())))
        with pytest.raises(ConfigError, match="'fsdp2' was asked for.*'ddp'"):
            dist_layerlr.optim.check_sharding(model, "fsdp2")
        dist_layerlr.optim.check_sharding(model, "ddp")
    with fresh_state():
        model = make_model()
        model, _ = fsdp2_accelerator().prepare(model, adamw(naive_groups(model.named_parameters())))
        dist_layerlr.optim.check_sharding(model, "fsdp2")
    with pytest.raises(ConfigError, match="'zero' was asked for"):
        dist_layerlr.optim.check_sharding(make_model(), "zero")


@cases
def test_07_verify_counts_the_ranks_itself(at: At) -> None:
    with fresh_state():
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero_config(1)))
        assert accelerator.num_processes == (2 if SEES_ALL else 1)
        optimizer = dist_layerlr.attach(plan, model, adamw)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config(1))[0]
        dist_layerlr.optim.check_sharding(engine, "zero")
        assert dist_layerlr.verify(plan, engine).ranks == 2


# --- 8: a scheduler stepped once per process ---


def halve(step: int) -> float:
    return 0.5**step


@cases
def test_08_naive_prepared_scheduler_steps_once_per_process(at: At) -> None:
    with fresh_state():
        accelerator = Accelerator(cpu=True)
        model = make_model()
        optimizer = adamw(naive_groups(model.named_parameters()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halve)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        backward(model, 0, at.rank)
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == RATES["self_attn"] * halve(2)


@cases
def test_08_check_scheduler_refuses_a_prepared_scheduler(at: At) -> None:
    with fresh_state():
        accelerator = Accelerator(cpu=True)
        optimizer = adamw(naive_groups(make_model().named_parameters()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halve)
        dist_layerlr.optim.check_scheduler(scheduler)
        with pytest.raises(ConfigError, match="2 times per optimizer step"):
            dist_layerlr.optim.check_scheduler(accelerator.prepare(scheduler))


@cases
def test_08_plan_schedule_steps_once_whatever_accelerate_prepared(at: At) -> None:
    schedule = dist_layerlr.Schedule(kind="linear", warmup_steps=2, total_steps=6, min_ratio=0.1)
    for make_accelerator in (lambda: Accelerator(cpu=True), fsdp2_accelerator):
        with fresh_state():
            model = make_model()
            plan = dist_layerlr.plan_model(model, CONFIG)
            model, optimizer = make_accelerator().prepare(
                model, dist_layerlr.attach(plan, model, adamw)
            )
            driver = dist_layerlr.PlanSchedule(optimizer, schedule)
            for step in range(3):
                assert driver.factor == schedule.factor(step)
                dist_layerlr.verify(plan, model, optimizer, factor=driver.factor)
                backward(model, step, at.rank)
                optimizer.step()
                driver.step()


@cases
def test_08_schedules_step_once_per_optimizer_step_under_accumulate(at: At) -> None:
    schedule = dist_layerlr.Schedule(kind="linear", total_steps=101)
    with fresh_state():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        raw = dist_layerlr.attach(plan, model, adamw)
        model, optimizer = accelerator.prepare(model, raw)
        # Where it was built, and whether Accelerate steps it once per process, is of no account.
        drivers = [dist_layerlr.PlanSchedule(o, schedule) for o in (optimizer, raw, raw)]
        steppers = [*drivers[:2], accelerator.prepare(drivers[2])]
        assert isinstance(steppers[2], AcceleratedScheduler)
        dist_layerlr.optim.check_scheduler(steppers[2])
        for step in range(40):
            with accelerator.accumulate(model):
                backward(model, step, at.rank)
                optimizer.step()
                for stepper in steppers:
                    stepper.step()
                optimizer.zero_grad()
            assert [d.last_step for d in drivers] == [(step + 1) // 4] * 3
        assert dist_layerlr.verify(plan, model, optimizer).step_factor == pytest.approx(0.9)


@cases
def test_08_verify_finds_a_schedule_that_ran_ahead(at: At) -> None:
    with fresh_state():
        accelerator = Accelerator(cpu=True)
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        optimizer = dist_layerlr.attach(plan, model, adamw)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, halve)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        backward(model, 0, at.rank)
        optimizer.step()
        scheduler.step()
        with pytest.raises(PlanMismatch, match="planned lr 0.002, live 0.001"):
            dist_layerlr.verify(plan, model, optimizer, factor=halve(1))


# --- 16: group dicts that nobody reads any more ---


@cases
def test_16_naive_reference_to_a_group_goes_stale_when_accelerate_wraps_the_optimizer(
    at: At,
) -> None:
    with fresh_state():
        model = make_model()
        optimizer = adamw(naive_groups(model.named_parameters()))
        held = optimizer.param_groups[0]
        _, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
        held["lr"] = 0.0
        assert optimizer.param_groups[0]["lr"] == RATES["self_attn"]


@cases
def test_16_plan_schedule_reads_the_live_groups_after_prepare(at: At) -> None:
    with fresh_state():
        model = make_model()
        plan = dist_layerlr.plan_model(model, config(depth_strategy="linear", min_depth_factor=0.5))
        optimizer = dist_layerlr.attach(plan, model, adamw)
        driver = dist_layerlr.PlanSchedule(
            optimizer, dist_layerlr.Schedule(kind="linear", total_steps=5)
        )
        model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
        driver.step()
        assert driver.factor == 0.75
        dist_layerlr.verify(plan, model, optimizer, factor=0.75)
