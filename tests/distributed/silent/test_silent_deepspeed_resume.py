"""Silent failures of DeepSpeed's checkpoints: groups by position, rates of an old plan.

Numbers in the names are the rows of the table of 22 silent failures, as in
test_silent_deepspeed.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import nn

import dist_layerlr
from dist_layerlr.errors import CheckpointError, PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.naive import (
    RATES,
    adamw,
    config,
    farthest,
    make_model,
    naive_groups,
)
from tests.support.naive_deepspeed import (
    ds_config,
    group_rates,
    masters,
    naive_engine,
    our_engine,
    run,
    silence,
    start,
    wrong,
)

cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


# --- 3: a checkpoint of the same groups in another order ---


def groups_by_block(model: nn.Module, order: tuple[int, ...]) -> list[dict[str, Any]]:
    """One group per block, all at one rate, so only the order differs."""
    named = list(model.named_parameters())
    groups = [
        {
            "params": [p for n, p in named if n.startswith(f"blocks.{i}.")],
            "lr": 1e-3,
            "name": f"block {i}",
        }
        for i in order
    ]
    rest = [p for n, p in named if not n.startswith("blocks.")]
    return [*groups, {"params": rest, "lr": 1e-3, "name": "rest"}]


def engine_by_block(stage: int, order: tuple[int, ...]) -> Any:
    model = make_model()
    return start(model, adamw(groups_by_block(model, order)), ds_config(stage))


@cases
def test_03_naive_resume_with_reordered_groups_swaps_fp32_weights_of_layers(at: At) -> None:
    for stage in (1, 2, 3):
        engine = engine_by_block(stage, (0, 1, 2))
        run(engine, at, steps=2)
        engine.save_checkpoint(str(at.folder), tag=f"z{stage}")
        resumed = engine_by_block(stage, (2, 1, 0))
        resumed.load_checkpoint(str(at.folder), tag=f"z{stage}")
        swapped = wrong(masters(engine), masters(resumed))
        assert {name.split(".")[1] for name in swapped} == {"0", "2"}, stage
        assert len(swapped) == 22, stage


@cases
def test_03_check_manifest_refuses_reordered_groups_before_the_load(at: At) -> None:
    plan = dist_layerlr.plan_model(make_model(), config(component_lr={}, default_lr=1e-3))
    for stage in (1, 2, 3):
        saved = dist_layerlr.proof.manifest(plan, engine_by_block(stage, (0, 1, 2)))
        dist_layerlr.proof.check_manifest(saved, plan, engine_by_block(stage, (0, 1, 2)))
        with pytest.raises(PlanMismatch, match=r"blocks\.0\."):
            dist_layerlr.proof.check_manifest(saved, plan, engine_by_block(stage, (2, 1, 0)))


@cases
def test_03_equal_plans_order_their_groups_alike_so_weights_return_by_name(at: At) -> None:
    rule = config(depth_strategy="linear", min_depth_factor=0.5)
    for stage in (1, 2, 3):
        plan, engine = our_engine(stage, rule)
        run(engine, at, steps=2)
        saved = dist_layerlr.proof.manifest(plan, engine)
        engine.save_checkpoint(str(at.folder), tag=f"z{stage}")
        plan, resumed = our_engine(stage, rule)
        dist_layerlr.proof.check_manifest(saved, plan, resumed)
        resumed.load_checkpoint(str(at.folder), tag=f"z{stage}")
        dist_layerlr.verify(plan, resumed)
        assert wrong(masters(engine), masters(resumed)) == [], stage


@cases
def test_03_our_checkpoint_fills_reordered_groups_by_name(at: At) -> None:
    plan = dist_layerlr.plan_model(make_model(), config(component_lr={}, default_lr=1e-3))
    for stage in (1, 2, 3):
        engine = engine_by_block(stage, (0, 1, 2))
        run(engine, at, steps=2)
        dist_layerlr.save_checkpoint(at.folder / f"ours{stage}", plan, engine, step=2)
        resumed = engine_by_block(stage, (2, 1, 0))
        dist_layerlr.load_checkpoint(at.folder / f"ours{stage}", plan, resumed)
        assert wrong(masters(engine), masters(resumed), 0.0) == [], stage
        run(engine, at, first=2)
        run(resumed, at, first=2)
        assert farthest(masters(engine), masters(resumed)) < 1e-7, stage


@cases
def test_03_load_deepspeed_refuses_reordered_groups_and_puts_the_rates_of_equal_ones_back(
    at: At,
) -> None:
    plan = dist_layerlr.plan_model(make_model(), config(component_lr={}, default_lr=1e-3))
    new = dist_layerlr.plan_model(make_model(), config(component_lr={}, default_lr=2e-3))
    for stage in (1, 3):
        engine = engine_by_block(stage, (0, 1, 2))
        run(engine, at, steps=2)
        dist_layerlr.checkpoint.save_deepspeed(at.folder, plan, engine, tag=f"named{stage}")
        swapped = engine_by_block(stage, (2, 1, 0))
        before = masters(swapped)
        with pytest.raises(
            PlanMismatch, match=r"the checkpoint has blocks\.0\..* where blocks\.2\..* is now"
        ):
            dist_layerlr.checkpoint.load_deepspeed(at.folder, plan, swapped, tag=f"named{stage}")
        assert wrong(before, masters(swapped), 0.0) == [], stage
        resumed = engine_by_block(stage, (0, 1, 2))
        dist_layerlr.checkpoint.load_deepspeed(at.folder, new, resumed, tag=f"named{stage}")
        assert wrong(masters(engine), masters(resumed), 0.0) == [], stage
        dist_layerlr.verify(new, resumed)
    with pytest.raises(CheckpointError, match="Save with dist_layerlr.checkpoint.save_deepspeed"):
        dist_layerlr.checkpoint.load_deepspeed(at.folder, plan, resumed, tag="nothing")


@cases
def test_03_load_deepspeed_misses_a_short_or_absent_file_on_all_ranks_alike(at: At) -> None:
    """DeepSpeed itself fails on the rank that reads it, and the others wait for that rank."""
    plan = dist_layerlr.plan_model(make_model(), config(component_lr={}, default_lr=1e-3))
    engine = engine_by_block(2, (0, 1, 2))
    run(engine, at)
    dist_layerlr.checkpoint.save_deepspeed(at.folder, plan, engine, tag="whole")
    run(engine, at, first=1)
    before = masters(engine)
    (shard,) = (at.folder / "whole").glob("zero_pp_rank_1_*")
    for told, damage in (
        ("bytes", lambda: os.truncate(shard, 100)),
        ("no such file", shard.unlink),
    ):
        if dist.get_rank() == 0:
            damage()
        dist.barrier()
        with pytest.raises(
            CheckpointError, match=rf"{shard.name}' is damaged or incomplete: .*{told}"
        ):
            dist_layerlr.checkpoint.load_deepspeed(at.folder, plan, engine, tag="whole")
    assert wrong(before, masters(engine), 0.0) == []


# --- 4: universal checkpoints ---


def to_universal(source: Path, target: Path) -> None:
    if dist.get_rank() == 0:
        arguments = argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with silence():
            ds_to_universal.main(arguments)
    dist.barrier()


def universal_resume(at: At, stage: int, engine: Any, resumed: Any) -> None:
    """Train, save, convert and load, all without an error."""
    run(engine, at, steps=2)
    engine.save_checkpoint(str(at.folder), tag=f"z{stage}")
    dist.barrier()
    to_universal(at.folder / f"z{stage}", at.folder / f"z{stage}_universal")
    with silence():
        resumed.load_checkpoint(str(at.folder), tag=f"z{stage}_universal")


UNIVERSAL = {"checkpoint": {"load_universal": True}}


@cases
def test_04_naive_universal_load_at_stage_3_gives_all_groups_the_first_rate(at: At) -> None:
    engine, resumed = naive_engine(3), naive_engine(3, **UNIVERSAL)
    assert len(set(group_rates(resumed))) == 3
    universal_resume(at, 3, engine, resumed)
    assert group_rates(resumed) == [RATES["self_attn"]] * 3
    assert wrong(masters(engine), masters(resumed)) == []


@cases
def test_04_naive_universal_load_at_stage_1_gives_reordered_groups_the_rates_of_others(
    at: At,
) -> None:
    engine = naive_engine(1)
    model = make_model()
    optimizer = adamw(naive_groups(model.named_parameters())[::-1])
    resumed = start(model, optimizer, ds_config(1, **UNIVERSAL))
    universal_resume(at, 1, engine, resumed)
    assert wrong(masters(engine), masters(resumed)) == []
    live = {n: p.lr for n, p in dist_layerlr.optim.read_back(resumed).items()}
    assert live["head.weight"] == RATES["self_attn"]
    assert live["blocks.0.attn.to_q.weight"] == RATES["default"]


@cases
def test_04_naive_universal_load_at_stage_3_counts_a_step_once_per_group(at: At) -> None:
    # Not in the table: all groups share one `step` tensor afterwards, which each group's update
    # increments.
    engine, resumed = naive_engine(3), naive_engine(3, **UNIVERSAL)
    universal_resume(at, 3, engine, resumed)
    run(resumed, at, first=2)
    states = resumed.optimizer.optimizer.state.values()
    assert len({id(state["step"]) for state in states}) == 1
    assert {int(state["step"]) for state in states} == {2 + 3}


@cases
def test_04_reapply_puts_every_rate_back_by_name_after_a_universal_load(at: At) -> None:
    for stage in (1, 3):
        _, engine = our_engine(stage)
        plan, resumed = our_engine(stage, **UNIVERSAL)
        universal_resume(at, stage, engine, resumed)
        if stage == 3:
            with pytest.raises(PlanMismatch, match="lr"):
                dist_layerlr.verify(plan, resumed)
        dist_layerlr.proof.reapply(plan, resumed)
        dist_layerlr.verify(plan, resumed)


@cases
def test_04_training_goes_on_alike_after_a_universal_load_and_reapply(at: At) -> None:
    for stage in (1, 3):
        _, engine = our_engine(stage)
        plan, resumed = our_engine(stage, **UNIVERSAL)
        universal_resume(at, stage, engine, resumed)
        dist_layerlr.proof.reapply(plan, resumed)
        run(engine, at, first=2)
        run(resumed, at, first=2)
        apart = farthest(masters(engine), masters(resumed))
        assert apart < 1e-6, (stage, apart)


@cases
def test_04_our_checkpoint_keeps_every_rate_and_step_counter_at_stage_3(at: At) -> None:
    plan, engine = our_engine(3)
    run(engine, at, steps=2)
    dist_layerlr.save_checkpoint(at.folder / "stage3", plan, engine, step=2)
    _, resumed = our_engine(3)
    dist_layerlr.load_checkpoint(at.folder / "stage3", plan, resumed)
    assert group_rates(resumed) == group_rates(engine)
    assert wrong(masters(engine), masters(resumed), 0.0) == []
    run(engine, at, first=2)
    run(resumed, at, first=2)
    assert {int(state["step"]) for state in resumed.optimizer.optimizer.state.values()} == {3}
    assert wrong(masters(engine), masters(resumed), 0.0) == []


# --- 6: resume brings the old plan's rates back ---


def tenfold() -> dict[str, Any]:
    rates = {key: 10 * rate for key, rate in RATES.items()}
    return config(
        component_lr={"self_attn": rates["self_attn"], "ffn": rates["ffn"]},
        default_lr=rates["default"],
    )


@cases
def test_06_naive_load_checkpoint_keeps_the_old_rates_of_a_new_plan(at: At) -> None:
    for stage in (1, 3):
        engine = naive_engine(stage)
        run(engine, at)
        engine.save_checkpoint(str(at.folder), tag=f"z{stage}")
        model = make_model()
        groups = naive_groups(model.named_parameters())
        for group in groups:
            group["lr"] *= 10
        resumed = start(model, adamw(groups), ds_config(stage))
        resumed.load_checkpoint(str(at.folder), tag=f"z{stage}")
        assert sorted(group_rates(resumed)) == sorted(RATES.values()), stage


@cases
def test_06_reapply_puts_the_new_plan_back_after_load_checkpoint(at: At) -> None:
    for stage in (1, 3):
        _, engine = our_engine(stage)
        run(engine, at)
        engine.save_checkpoint(str(at.folder), tag=f"z{stage}")
        plan, resumed = our_engine(stage, tenfold())
        resumed.load_checkpoint(str(at.folder), tag=f"z{stage}")
        with pytest.raises(PlanMismatch, match="lr"):
            dist_layerlr.verify(plan, resumed)
        dist_layerlr.proof.reapply(plan, resumed)
        dist_layerlr.verify(plan, resumed)
