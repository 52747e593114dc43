"""Silent failures of DeepSpeed ZeRO, on real engines: each shown on naive code, then with ours.

Numbers in the names are the rows of the table of 22 silent failures. The first test of a row
asserts that naive code still fails without an error: when it no longer passes, upstream mended it.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
)
from torch import nn

import dist_layerlr
from dist_layerlr.errors import PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.naive import (
    CONFIG,
    RATES,
    adamw,
    batch,
    config,
    farthest,
    make_model,
    naive_groups,
    wanted_rates,
)
from tests.support.naive_deepspeed import (
    ds_config,
    group_rates,
    masters,
    our_engine,
    run,
    silence,
    start,
    trained,
)
from tests.support.toys import WIDTH, Toy

cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


# --- 1: the promise on every stage ---


@cases
def test_01_attach_before_initialize_trains_every_name_as_one_process_would(at: At) -> None:
    reference = trained(3)
    for stage in (0, 1, 2, 3):
        plan, engine = our_engine(stage)
        dist_layerlr.verify(plan, engine)
        assert {
            n: p.lr for n, p in dist_layerlr.optim.read_back(engine).items()
        } == wanted_rates(), stage
        run(engine, at, steps=3)
        dist_layerlr.verify(plan, engine)
        assert farthest(masters(engine), reference) < 5e-6, stage


# --- 8: one factor for all ranks and stages, counted in optimizer steps ---


@cases
def test_08_plan_schedule_gives_every_stage_the_same_rates(at: At) -> None:
    schedule = dist_layerlr.Schedule(kind="linear", warmup_steps=2, total_steps=6, min_ratio=0.1)
    for stage in (0, 1, 2, 3):
        plan, engine = our_engine(stage)
        driver = dist_layerlr.PlanSchedule(engine.optimizer, schedule)
        for step in range(4):
            assert driver.factor == schedule.factor(step)
            dist_layerlr.verify(plan, engine, factor=driver.factor)
            run(engine, at, first=step)
            driver.step()


# --- 10: shapes under zero.Init ---


@cases
def test_10_naive_ndim_rule_under_zero_init_takes_weight_decay_from_every_parameter(at: At) -> None:
    with deepspeed.zero.Init(config_dict_or_path=ds_config(3)):
        model = Toy()
    assert {(param.ndim, param.numel()) for param in model.parameters()} == {(1, 0)}


@cases
def test_10_a_plan_under_zero_init_sees_true_shapes(at: At) -> None:
    rule = config(weight_decay=0.1, no_decay=["ndim<=1"])
    with deepspeed.zero.Init(config_dict_or_path=ds_config(3)):
        model = Toy()
    plan = dist_layerlr.plan_model(model, rule)
    assert plan.digest == dist_layerlr.plan_model(make_model(), rule).digest
    engine = start(model, dist_layerlr.attach(plan, model, adamw), ds_config(3))
    dist_layerlr.verify(plan, engine)
    live = dist_layerlr.optim.read_back(engine)
    assert {n: p.weight_decay for n, p in live.items()} == {
        name: 0.1 if param.ndim >= 2 else 0.0 for name, param in make_model().named_parameters()
    }


# --- 12: empty and frozen groups ---


def with_an_empty_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [], "lr": 9e-3, "name": "nothing"}, *naive_groups(model.named_parameters())]


@cases
def test_12_naive_base_rates_kept_by_position_shift_when_an_empty_group_is_dropped(at: At) -> None:
    model = make_model()
    optimizer = adamw(with_an_empty_group(model))
    base = [group["lr"] for group in optimizer.param_groups]
    engine = start(model, optimizer, ds_config(1))
    # A warmup written by hand, as in many training scripts.
    for group, rate in zip(engine.optimizer.param_groups, base, strict=False):
        group["lr"] = 0.5 * rate
    assert group_rates(engine)[0] == 0.5 * 9e-3
    # torch's own schedulers say so since 2.10; before, they shifted in the same way.
    model = make_model()
    optimizer = adamw(with_an_empty_group(model))
    engine = start(
        model,
        optimizer,
        ds_config(1),
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, float),
    )
    with pytest.raises(ValueError, match="zip"):
        run(engine, at)


@cases
def test_12_attach_leaves_frozen_parameters_and_empty_groups_out(at: At) -> None:
    schedule = dist_layerlr.Schedule(kind="linear", warmup_steps=2, total_steps=6)
    for stage in (0, 1, 2, 3):
        model = make_model()
        for name, param in model.named_parameters():
            param.requires_grad_(".mlp." not in name)
        plan = dist_layerlr.plan_model(model, CONFIG)
        optimizer = dist_layerlr.attach(plan, model, adamw)
        assert all(group["params"] for group in optimizer.param_groups)
        engine = start(model, optimizer, ds_config(stage))
        driver = dist_layerlr.PlanSchedule(engine.optimizer, schedule)
        run(engine, at)
        driver.step()
        dist_layerlr.verify(plan, engine, factor=driver.factor)


# --- 15: what zero_to_fp32 leaves out ---


def partly_frozen() -> Toy:
    model = make_model()
    for name, param in model.named_parameters():
        param.requires_grad_(not (name.startswith("emb.") or ".mlp.0." in name))
    return model


@cases
def test_15_naive_export_of_stage_1_loses_frozen_parameters(at: At) -> None:
    model = partly_frozen()
    engine = start(model, adamw(naive_groups(model.named_parameters())), ds_config(1))
    run(engine, at)
    engine.save_checkpoint(str(at.folder), tag="t")
    dist.barrier()
    if at.rank == 0:
        with silence():
            exported = get_fp32_state_dict_from_zero_checkpoint(str(at.folder), tag="t")
        lost = {name for name, param in model.named_parameters() if name not in exported}
        assert lost == {name for name, param in model.named_parameters() if not param.requires_grad}
        assert len(lost) == 8
    dist.barrier()


@cases
def test_15_naive_export_of_tied_weights_to_safetensors_raises(at: At) -> None:
    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (
                nn.Linear(WIDTH, WIDTH, bias=False),
                nn.Linear(WIDTH, WIDTH, bias=False),
            )
            self.two.weight = self.one.weight

    torch.manual_seed(0)
    model = Tied()
    engine = start(model, adamw(naive_groups(model.named_parameters())), ds_config(2))
    engine.save_checkpoint(str(at.folder), tag="t")
    dist.barrier()
    if at.rank == 0:
        target = str(at.folder / "out")
        with silence(), pytest.raises(RuntimeError, match="share memory"):
            convert_zero_checkpoint_to_fp32_state_dict(
                str(at.folder), target, safe_serialization=True, tag="t"
            )
    dist.barrier()


@cases
def test_15_our_checkpoint_brings_frozen_parameters_back_at_every_stage(at: At) -> None:
    for stage in (0, 1, 2, 3):
        model = partly_frozen()
        plan = dist_layerlr.plan_model(model, CONFIG)
        engine = start(model, dist_layerlr.attach(plan, model, adamw), ds_config(stage))
        run(engine, at)
        dist_layerlr.save_checkpoint(at.folder / f"frozen{stage}", plan, engine, step=1)
        other = partly_frozen()
        with torch.no_grad():
            for param in other.parameters():
                param.mul_(2.0)
        resumed = start(other, dist_layerlr.attach(plan, other, adamw), ds_config(stage))
        dist_layerlr.load_checkpoint(at.folder / f"frozen{stage}", plan, resumed)
        x, _ = batch(1, at.rank)
        assert torch.equal(engine(x), resumed(x)), stage


@cases
def test_15_every_name_of_the_model_is_planned_or_known_to_be_frozen(at: At) -> None:
    for stage in (1, 2, 3):
        model = partly_frozen()
        plan = dist_layerlr.plan_model(model, CONFIG)
        engine = start(model, dist_layerlr.attach(plan, model, adamw), ds_config(stage))
        frozen = {
            name for name, param in engine.module.named_parameters() if not param.requires_grad
        }
        live = dist_layerlr.optim.read_back(engine)
        assert (len(frozen), plan.frozen) == (8, 8), stage
        assert live.keys() | frozen == set(wanted_rates()), stage


# --- 21: the cost of many groups ---


@cases
def test_21_naive_group_per_tensor_partitions_and_gathers_each_tensor_alone(at: At) -> None:
    model = make_model()
    groups = [{"params": [param], "lr": 1e-3} for param in model.parameters()]
    engine = start(model, adamw(groups), ds_config(1))
    assert (
        len(engine.optimizer.single_partition_of_fp32_groups) == len(groups) == len(wanted_rates())
    )


@cases
def test_21_equal_rates_share_a_group_so_partitions_are_few(at: At) -> None:
    # One partition for any number of rates is the segmented emission, a later issue.
    for stage in (1, 2):
        plan, engine = our_engine(stage)
        assert len(engine.optimizer.single_partition_of_fp32_groups) <= len(RATES), stage
        dist_layerlr.verify(plan, engine)


# --- 22: ranks with different plans ---


@cases
def test_22_naive_ranks_with_different_rates_train_on_without_an_error(at: At) -> None:
    model = make_model()
    groups = naive_groups(model.named_parameters())
    for group in groups:
        group["lr"] *= 1 + at.rank  # a config file that differs on one machine
    engine = start(model, adamw(groups), ds_config(1))
    run(engine, at, steps=2)
    rates: list[Any] = [None, None]
    dist.all_gather_object(rates, group_rates(engine))
    assert rates[1] == [2 * rate for rate in rates[0]]


@cases
def test_22_verify_stops_every_rank_when_their_plans_differ(at: At) -> None:
    rule = config(default_lr=RATES["default"] * (1 + at.rank))
    with pytest.raises(PlanMismatch, match="differ between ranks"):
        our_engine(1, rule)  # attach asks already
    for stage in (1, 3):
        _, engine = our_engine(stage)
        with pytest.raises(PlanMismatch, match="differ between ranks"):
            dist_layerlr.verify(dist_layerlr.plan_model(make_model(), rule), engine)
