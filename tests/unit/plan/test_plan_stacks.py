"""Depth of a plan by stack, and the warnings of a plan."""

from __future__ import annotations

import math

import pytest

from dist_layerlr import ConfigError, build_plan
from tests.support import census
from tests.support.plans import RATES, config, toy

# Stacks


@pytest.mark.parametrize("strategy", ["linear", "inverted_u", "layer_decay"])
def test_refiners_are_not_slowed_by_depth(strategy: str):
    plan = build_plan(census.shapes("z_image"), config(depth_strategy=strategy))
    refiners = [e for e in plan.entries.values() if e.stack in ("noise_refiner", "context_refiner")]
    assert refiners and {e.factor for e in refiners} == {1.0}
    assert min(e.factor for e in plan.entries.values() if e.stack == "layers") < 0.5


def test_a_region_may_ask_for_depth_in_a_refiner():
    plan = build_plan(
        census.shapes("z_image"),
        config(regions=[{"match": "noise_refiner", "depth_strategy": "linear"}]),
    )
    got = {
        (e.stack, e.block): e.factor
        for e in plan.entries.values()
        if e.stack and "refiner" in e.stack
    }
    assert got == {
        ("noise_refiner", 0): 1.0,
        ("noise_refiner", 1): pytest.approx(0.3),
        ("context_refiner", 0): 1.0,
        ("context_refiner", 1): 1.0,
    }


@pytest.mark.parametrize("scope", ["stack", "trunk"])
def test_both_models_of_wan22_have_their_own_depth(scope: str):
    wan = {
        n: s
        for n, s in census.shapes("wan21_i2v_14b").items()
        if "image_embedder" not in n and ".add_" not in n
    }
    dual = {f"{m}.{n}": s for m in ("transformer", "transformer_2") for n, s in wan.items()}
    single = build_plan(wan, config(depth_scope=scope))
    plan = build_plan(dual, config(depth_scope=scope))
    for model in ("transformer", "transformer_2"):
        for name, entry in single.entries.items():
            got = plan.entries[f"{model}.{name}"]
            assert (got.component, got.block, got.blocks, got.lr) == (
                entry.component,
                entry.block,
                entry.blocks,
                entry.lr,
            )
            assert got.stack == (f"{model}.blocks" if entry.stack else None)


def test_a_unet_is_one_ordered_stack():
    entries = build_plan(census.shapes("sd15"), config()).entries.values()
    order = {(e.stack, e.block) for e in entries if e.stack}
    downs, mid, ups = (
        [b for s, b in sorted(order) if s == name]
        for name in ("down_blocks", "mid_block", "up_blocks")
    )
    assert (downs, mid, ups) == ([0, 1, 2, 3], [4], [5, 6, 7, 8])
    assert {e.panel for e in entries if e.stack} == {"down_blocks, mid_block, up_blocks"}


def test_a_unet_under_its_original_names_is_one_ordered_stack_of_25():
    """The middle block is a Sequential of three modules and yet one step."""
    parts = [
        "0.in_layers.2",
        "1.transformer_blocks.0.attn1.to_q",
        "1.transformer_blocks.0.attn2.to_q",
    ]
    names = [
        f"{stage}.{i}.{p}.weight"
        for stage in ("input_blocks", "output_blocks")
        for i in range(12)
        for p in parts
    ]
    names += [f"middle_block.{p}.weight" for p in (*parts, "2.in_layers.2")]
    entries = build_plan({name: (8, 8) for name in names}, config()).entries
    assert {e.blocks for e in entries.values()} == {25}
    assert {e.block for e in entries.values() if e.stack == "middle_block"} == {12}
    assert sorted({e.block for e in entries.values() if e.stack == "output_blocks"}) == list(
        range(13, 25)
    )


def test_original_flux_single_blocks_are_a_stack_without_attention_names():
    names = [
        f"double_blocks.{i}.{p}.weight"
        for i in range(3)
        for p in ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0")
    ]
    names += [
        f"single_blocks.{i}.{p}.weight"
        for i in range(4)
        for p in ("linear1", "linear2", "modulation.lin")
    ]
    entries = build_plan({n: (8, 8) for n in names}, config()).entries
    assert {(e.stack, e.blocks) for e in entries.values()} == {
        ("double_blocks", 3),
        ("single_blocks", 4),
    }
    assert entries["double_blocks.0.txt_attn.qkv.weight"].component == "cross_attn"
    fused = build_plan(
        {n: (8, 8) for n in names}, config(component_lr={**RATES, "fused": 1e-6})
    ).entries
    assert fused["single_blocks.0.linear1.weight"].component == "fused"


# Warnings


@pytest.mark.parametrize(
    ("shapes", "block", "text"),
    [
        (
            toy(),
            {},
            "2 parameters (9.6% of the elements) match no component and take default_lr=0.0001",
        ),
        (
            toy(),
            {"component_lr": {"ffn": 1e-4, "self_attn": 1e-4}},
            "component_lr does not list cross_attn, norm",
        ),
        (
            toy(),
            {"component_lr": {**RATES, "modulation": 1}},
            "component_lr.modulation applies to no trainable parameter",
        ),
        (toy(), {"default_lr": 1e-2}, "default_lr=0.01 is 25 times the largest component_lr"),
    ],
    ids=["unmatched", "unlisted", "unused", "loud default"],
)
def test_what_a_user_may_not_have_meant_is_said(shapes: dict, block: dict, text: str):
    warnings = build_plan(shapes, config(**block)).warnings
    assert [w for w in warnings if text in w], warnings


def test_norm_named_matrices_are_reported_with_their_share():
    shapes = census.shapes("flux1_dev")
    matrices = [math.prod(s) for n, s in shapes.items() if "norm" in n and len(s) == 2]
    share = sum(matrices) / sum(math.prod(s) for s in shapes.values())
    assert 0.27 < share < 0.29  # the modulation of Flux
    (text,) = [w for w in build_plan(shapes, config()).warnings if "norm-named module" in w]
    assert text.startswith(f"{share:.1%} of the elements are matrices") and "'modulation'" in text
    told = build_plan(shapes, config(component_lr={**RATES, "modulation": 1e-5})).warnings
    assert not [w for w in told if "norm-named module" in w]


def test_a_plan_without_surprises_has_no_warnings():
    inside = {n: s for n, s in toy().items() if n.startswith("blocks")}
    assert build_plan(inside, config()).warnings == ()
    assert not [
        w
        for w in build_plan(toy(), config(unmatched="default")).warnings
        if "match no component" in w
    ]


def test_a_rule_that_an_earlier_one_hides_is_said():
    regions = [
        {"match": "blocks.1", "depth_strategy": "flat"},
        {"match": "blocks.1.attn1", "lr": 5e-4},
    ]
    warnings = build_plan(toy(), config(regions=regions)).warnings
    assert any("regions[1].match='blocks.1.attn1' never applies" in w for w in warnings)


def test_no_decay_norm_holds_whatever_component_a_pattern_gives_the_norm():
    rule = [{"match": "*.norm1", "component": "ffn"}]
    plan = build_plan(toy(), config(patterns=rule, weight_decay=0.1, no_decay=["norm"]))
    norm = plan.entries["blocks.0.norm1.weight"]
    assert (norm.component, norm.weight_decay) == ("ffn", 0.0)


def test_a_layer_count_below_the_models_is_refused():
    with pytest.raises(ConfigError, match="num_layers=2"):
        build_plan(toy(), config(depth_strategy="layer_decay", num_layers=2))


def test_a_floor_for_curves_does_not_reach_a_region_with_layer_decay():
    region = {"match": "blocks", "depth_strategy": "layer_decay", "layer_decay": 0.1}
    plan = build_plan(toy(), config(min_depth_factor=0.5, regions=[region]))
    assert plan.entries["blocks.0.norm1.weight"].factor == pytest.approx(0.1**3)


def test_a_huge_block_index_costs_nothing():
    names = {f"blocks.{i}.attn1.to_q.weight": (4, 4) for i in (0, 99_999_999)}
    assert (
        build_plan(names, config()).entries["blocks.99999999.attn1.to_q.weight"].blocks
        == 100_000_000
    )
