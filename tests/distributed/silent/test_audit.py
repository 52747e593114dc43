"""Verify without attach: it audits models that somebody else prepared, and says so when a library
has moved its parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from dist_layerlr import Plan, PlanMismatch, plan_model, verify
from dist_layerlr.optim import read_back
from dist_layerlr.sharders import sharder_of
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import (
    SHARDERS,
    Native,
    Zero,
    ds_config,
    fsdp1,
    fsdp1_flat,
    fsdp2,
    start_deepspeed,
)
from tests.support.parity import Recipe

cases = Cases(before=start_deepspeed)
RECIPE = Recipe()
BF16 = {"bf16": {"enabled": True}}
ZEROS: dict[str, dict[str, Any]] = {
    **{f"zero {s}": {"stage": s} for s in range(4)},
    **{f"zero {s} bf16": {"stage": s, **BF16} for s in range(4)},
    "zero 1 bf16 with fp32 accumulation": {
        "stage": 1,
        **BF16,
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "zero 3 in small sub-groups": {"stage": 3, "zero": {"sub_group_size": 500}},
    "zero 3 hpZ": {"stage": 3, "zero": {"zero_hpz_partition_size": 2}},
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def plan() -> Plan:
    return plan_model(RECIPE.model(), RECIPE.config)


def by_hand(
    model: nn.Module, rates: Callable[[str, float], float] = lambda _, rate: rate
) -> torch.optim.Optimizer:
    """One group per distinct (lr, weight decay), from names as a user sees them; true shapes are of
    a fresh model."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    wanted = RECIPE.wanted()
    for name, param in model.named_parameters():
        clean = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
        if param.requires_grad:
            rate, decay = wanted[clean]
            groups.setdefault((rates(clean, rate), decay), []).append(param)
    return RECIPE.make(
        [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]
    )


def engine(
    stage: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = by_hand, **fields: Any
) -> Any:
    model = RECIPE.model()
    config = ds_config(stage, RECIPE, **fields)
    return deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)[0]


@cases
def test_groups_that_are_right_by_hand_pass(at: At) -> None:
    for wrap in (lambda m: m, SHARDERS["ddp"], fsdp1, fsdp2):
        model = wrap(RECIPE.model())
        proof = verify(plan(), model, by_hand(model))
        assert (proof.ranks, proof.parameters) == (2, len(RECIPE.wanted()))
    for settings in ZEROS.values():
        assert verify(plan(), engine(**settings)).parameters == len(RECIPE.wanted())


@cases
def test_one_optimizer_over_flat_parameters_is_refused_by_name(at: At) -> None:
    model = fsdp1_flat(RECIPE.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    with pytest.raises(PlanMismatch) as error:
        verify(plan(), model, optimizer)
    text = str(error.value)
    assert re.search(r"\(first 10 of \d\d\):", text) and re.search(
        r"  patch\.weight: planned lr 0\.0003, live 0\.002", text
    )
    assert "groups were merged" in text and "attach(plan, model, make)" not in text
    assert read_back(model, optimizer).keys() > RECIPE.wanted().keys()  # and the frozen ones


@cases
def test_a_wrong_rate_is_told_with_ten_names_the_rank_the_cause_and_its_fix(at: At) -> None:
    def doubled(name: str, rate: float) -> float:
        return rate * 2 if ".ffn." in name else rate

    def check(model: nn.Module, optimizer: Any = None) -> None:
        with pytest.raises(PlanMismatch) as error:
            verify(plan(), model, optimizer)
        first, *lines = str(error.value).splitlines()
        shown, causes = (
            [x for x in lines if ": planned" in x],
            [x for x in lines if "likely cause" in x],
        )
        assert first == "The live optimizer differs from the plan on rank 0 (first 10 of 12):"
        assert len(shown) == 10 and len(causes) == 1
        assert shown[0] == "  blocks.0.ffn.0.weight: planned lr 0.001, live 0.002"
        assert "PlanSchedule" in causes[0] and "reapply" in causes[0]

    for wrap in (SHARDERS["ddp"], fsdp1, fsdp2):
        model = wrap(RECIPE.model())
        check(model, by_hand(model, doubled))
    for stage in range(4):
        check(engine(stage, lambda model: by_hand(model, doubled)))


@cases
def test_a_wrong_weight_decay_is_told_by_name(at: At) -> None:
    model = fsdp2(RECIPE.model())
    optimizer = by_hand(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.1
    with pytest.raises(PlanMismatch, match="gate: planned weight decay 0, live 0.1"):
        verify(plan(), model, optimizer)


@cases
def test_strangers_forgotten_and_unplanned_parameters_are_told(at: At) -> None:
    model = fsdp2(RECIPE.model())
    optimizer = by_hand(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(
        PlanMismatch, match="1 tensors in the optimizer are no parameters of the model"
    ):
        verify(plan(), model, optimizer)
    optimizer = by_hand(model)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not model.last.weight]
    with pytest.raises(PlanMismatch, match="last.weight: not stepped by the optimizer"):
        verify(plan(), model, optimizer)
    optimizer.add_param_group({"params": [model.last.weight], "lr": 3e-4, "weight_decay": 0.1})
    optimizer.add_param_group({"params": [model.still.weight], "lr": 3e-4})
    with pytest.raises(PlanMismatch, match="still.weight: stepped at lr 0.0003, not in the plan"):
        verify(plan(), model, optimizer)


# --- canaries: what the adapters read of torch and DeepSpeed, and what it means ---


def sharded() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    def native(wrap: Any) -> tuple[nn.Module, Any]:
        driver = Native(wrap, RECIPE)
        return driver.model, driver.optimizer

    more = {
        "unsharded": lambda m: m,
        "fsdp1 NO_SHARD": lambda m: fsdp1(m, strategy="NO_SHARD"),
        **SHARDERS,
    }
    natives = {name: (lambda wrap=wrap: native(wrap)) for name, wrap in more.items()}
    return {
        **natives,
        **{name: (lambda s=s: (Zero(RECIPE, **s).model, None)) for name, s in ZEROS.items()},
    }


@cases
def test_every_piece_holds_the_elements_that_the_adapter_says_it_holds(at: At) -> None:
    fresh = {name: param.detach().flatten() for name, param in RECIPE.model().named_parameters()}
    for sharder, build in sharded().items():
        model, optimizer = build()
        pieces = sharder_of(model).pieces(optimizer).pieces
        assert {p.name for p in pieces} == RECIPE.wanted().keys(), sharder
        for piece in pieces:
            whole = fresh[piece.name].bfloat16().float() if "bf16" in sharder else fresh[piece.name]
            if (
                sharder == "zero 0 bf16"
            ):  # DeepSpeed steps it once with zero gradients, which decays weights
                rate, decay = RECIPE.wanted()[piece.name]
                whole = whole * (1 - rate * decay)
            held = piece.of(piece.owner).float()
            assert torch.equal(held, whole[piece.start : piece.start + piece.numel]), (
                sharder,
                piece.name,
            )


@cases
def test_pieces_of_all_ranks_cover_every_element_as_often_as_they_say(at: At) -> None:
    for sharder, build in sharded().items():
        model, optimizer = build()
        mine = [
            (p.name, p.start, p.numel, p.replicas)
            for p in sharder_of(model).pieces(optimizer).pieces
        ]
        heard: list[Any] = [None] * at.world_size
        dist.all_gather_object(heard, mine)
        counts = {
            n: torch.zeros(p.numel())
            for n, p in RECIPE.model().named_parameters()
            if p.requires_grad
        }
        times = {name: replicas for name, _, _, replicas in mine}
        for name, start, numel, _ in (piece for pieces in heard for piece in pieces):
            counts[name][start : start + numel] += 1
        assert all(bool((count == times[name]).all()) for name, count in counts.items()), sharder


def has(thing: Any, *names: str) -> None:
    missing = [name for name in names if not hasattr(thing, name)]
    assert not missing, f"{type(thing).__name__} has lost {missing}: mend the adapter"


@cases
def test_canary_fsdp1_keeps_its_map_of_original_names(at: At) -> None:
    for flat in (True, False):
        model = fsdp1(RECIPE.model(), flat=flat)
        units = [m for m in model.modules() if isinstance(m, FSDP)]
        assert len(units) == 5  # the root, three blocks, the frozen layer
        for unit in units:
            has(unit._handle, "flat_param", "uses_sharded_strategy", "world_size", "rank")
            has(
                unit._handle.flat_param,
                "_fqns",
                "_shard_param_infos",
                "_params",
                "_numels",
                "_shared_param_infos",
            )
            for info in unit._handle.flat_param._shard_param_infos:
                has(info, "in_shard", "offset_in_shard", "numel_in_shard", "intra_param_start_idx")
            assert (unit._handle.flat_param._params is None) == flat
        names = {n.rpartition(".")[2] for n, _ in model.named_parameters()}
        assert (names == {"_flat_param"}) == flat


@cases
def test_canary_fsdp2_keeps_names_and_makes_dtensors(at: At) -> None:
    model = fsdp2(RECIPE.model())
    for name, param in model.named_parameters():
        assert name in dict(RECIPE.model().named_parameters()) and isinstance(param, DTensor)
        assert tuple(param.device_mesh.get_coordinate()) == (at.rank,) and [
            p.is_shard(0) for p in param.placements
        ] == [True]


@cases
def test_canary_zero_1_and_2_keep_original_groups_and_fragments(at: At) -> None:
    for stage in (1, 2):
        optimizer = engine(stage).optimizer
        has(
            optimizer,
            "bit16_groups",
            "single_partition_of_fp32_groups",
            "optimizer",
            "param_groups",
        )
        assert len(optimizer.bit16_groups) == len(optimizer.param_groups)
        for param in (p for group in optimizer.bit16_groups for p in group):
            has(param, "_hp_mapping")
            if param._hp_mapping is not None:
                has(param._hp_mapping, "hp_fragment_address", "lp_fragment_address")
                has(param._hp_mapping.hp_fragment_address, "start", "numel")


@cases
def test_canary_zero_3_keeps_sub_groups_and_partitions(at: At) -> None:
    optimizer = engine(3).optimizer
    has(
        optimizer,
        "fp16_groups",
        "sub_group_to_group_id",
        "fp32_partitioned_groups_flat",
        "optimizer",
    )
    for param in (p for group in optimizer.fp16_groups for p in group):
        has(param, "ds_numel", "ds_shape", "ds_process_group", "partition_numel")
        assert param.partition_numel() == -(-param.ds_numel // 2)


@cases
def test_canary_mixed_precision_wrappers_keep_their_copies(at: At) -> None:
    wrapper = engine(1, **BF16, data_types={"grad_accum_dtype": "fp32"}).optimizer
    assert type(wrapper).__name__ == "BF16_Optimizer"
    has(wrapper, "bf16_groups", "fp32_groups_flat_partition", "optimizer")
    wrapper = engine(0, **BF16).optimizer
    assert type(wrapper).__name__ == "FP16_UnfusedOptimizer"
    has(wrapper, "fp16_groups", "fp32_groups", "optimizer")


@cases
def test_a_library_that_moved_its_parts_is_named_with_the_version_that_had_them(at: At) -> None:
    lost = {1: "single_partition_of_fp32_groups", 3: "sub_group_to_group_id"}
    for stage, attribute in lost.items():
        moved = engine(stage)
        delattr(moved.optimizer, attribute)
        with pytest.raises(
            PlanMismatch,
            match=f"Cannot read back ZeRO stage {stage}: .*{attribute}.*deepspeed 0.19",
        ):
            verify(plan(), moved)
    for attribute in ("_fqns", "_shard_param_infos", "_numels"):
        driver = Native(fsdp1_flat, RECIPE)
        delattr(driver.model._handle.flat_param, attribute)
        with pytest.raises(
            PlanMismatch, match=f"Cannot read back FSDP1: .*{attribute}.*torch 2.13"
        ):
            verify(driver.plan, driver.model, driver.optimizer)
