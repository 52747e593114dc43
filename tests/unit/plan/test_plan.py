"""The plan as a whole: groups, digest, rules in order, stacks and warnings."""

from __future__ import annotations

import math
import random

import pytest

from dist_layerlr import ConfigError, build_plan, plan_diff, register_component_rule
from dist_layerlr.plan import ParamInfo
from dist_layerlr.plan import components as components_module
from dist_layerlr.plan.entries import Plan
from tests import census

RATES = {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5}
PARTS = {
    "attn1.to_q.weight": (8, 8),
    "attn2.to_q.weight": (8, 8),
    "ffn.net.2.weight": (8, 8),
    "norm1.weight": (8,),
}


def config(**block) -> dict:
    return {
        "model_type": "toy",
        "per_layer_lr": {"enabled": True, "component_lr": RATES, "default_lr": 1e-4, **block},
    }


def toy(blocks: int = 3, stack: str = "blocks") -> dict[str, tuple[int, ...]]:
    """A transformer with an embedding and a head outside its blocks."""
    names = {f"{stack}.{i}.{part}": shape for i in range(blocks) for part, shape in PARTS.items()}
    return {"x_embedder.weight": (8, 4), **names, "proj_out.weight": (4, 8)}


def lrs(plan: Plan) -> dict[str, float]:
    return {name: e.lr for name, e in plan.entries.items()}


# Digest and groups


def test_the_digest_does_not_depend_on_the_order_of_names():
    names = list(census.shapes("z_image").items())
    shuffled = random.Random(1).sample(names, len(names))
    first, second = build_plan(names, config()), build_plan(shuffled, config())
    assert first.digest == second.digest and plan_diff(first, second) == []
    assert [g.name for g in first.groups] == [g.name for g in second.groups]


@pytest.mark.parametrize(
    "change",
    [
        {"min_depth_factor": 0.31},
        {"component_lr": {**RATES, "norm": 6e-5}},
        {"weight_decay": 0.1},
        {"no_decay": ["norm"]},
        {"default_lr": 2e-4},
    ],
    ids=str,
)
def test_the_digest_changes_with_every_rate_and_weight_decay(change: dict):
    before, after = build_plan(toy(), config()), build_plan(toy(), config(**change))
    assert before.digest != after.digest
    lines = plan_diff(before, after, every_name=True)
    assert lines and all(line.split(": ")[0] in before.entries for line in lines)


def test_the_digest_changes_with_a_name_or_a_shape():
    digests = {
        build_plan(toy() | extra, config()).digest
        for extra in ({}, {"y.weight": (8,)}, {"proj_out.weight": (4, 9)})
    }
    assert len(digests) == 3


@pytest.mark.parametrize("file", ["flux1_dev", "sdxl", "z_image", "rfdetr_base"])
def test_groups_are_merged_unique_and_cover_every_parameter_once(file: str):
    plan = build_plan(census.shapes(file), config(weight_decay=0.1, no_decay=["ndim<=1"]))
    settings = [(g.lr, g.weight_decay) for g in plan.groups]
    assert len(set(settings)) == len(settings)
    assert len({g.name for g in plan.groups}) == len(plan.groups)
    assert all(g.names for g in plan.groups)
    listed = [name for g in plan.groups for name in g.names]
    assert sorted(listed) == sorted(plan.entries)
    for g in plan.groups:
        assert {(plan.entries[n].lr, plan.entries[n].weight_decay) for n in g.names} == {
            (g.lr, g.weight_decay)
        }


def test_cells_with_equal_settings_share_a_group():
    plan = build_plan(toy(), config(component_lr=dict.fromkeys(RATES, 1e-4), depth_strategy="flat"))
    assert len(plan.groups) == 1 and len(plan.groups[0].names) == len(toy())


def test_learning_rate_zero_is_a_group_and_is_reported_as_held_still():
    plan = build_plan(toy(), config(component_lr={**RATES, "norm": 0}))
    still = [g for g in plan.groups if g.lr == 0]
    assert [len(g.names) for g in still] == [3]
    assert any(
        "3 trainable parameters have lr 0 and are held still (frozen)" in text
        for text in plan.warnings
    )


# What counts


def test_frozen_parameters_count_for_depth_and_are_not_planned():
    infos = [
        ParamInfo(name=n, shape=s, trainable=".0." in n or ".1." in n) for n, s in toy(5).items()
    ]
    plan = build_plan(infos, config())
    assert len(plan.entries) == 8 and plan.frozen == len(infos) - 8
    assert plan.entries["blocks.1.ffn.net.2.weight"].blocks == 5
    assert plan.entries["blocks.1.ffn.net.2.weight"].lr == pytest.approx(3e-4 * (1 - 0.25 * 0.7))


def test_a_lora_on_a_few_blocks_takes_its_depth_from_the_base():
    lora = {f"blocks.{i}.attn1.to_q.lora_A.default.weight": (2, 8) for i in (1, 2)}
    plan = build_plan(lora, config(), base=toy(5))
    assert [(e.block, e.blocks) for e in plan.entries.values()] == [(1, 5), (2, 5)]


def test_attn2_is_read_with_its_frozen_siblings():
    """SD3.5: a LoRA that targets attn2 alone shows no sibling `attn`."""
    base = {
        f"transformer_blocks.{i}.{part}.to_q.weight": (8, 8)
        for i in range(2)
        for part in ("attn", "attn2")
    }
    lora = {f"transformer_blocks.{i}.attn2.to_q.lora_A.default.weight": (2, 8) for i in range(2)}
    assert {e.component for e in build_plan(lora, config(), base=base).entries.values()} == {
        "self_attn"
    }
    assert {e.component for e in build_plan(lora, config()).entries.values()} == {"cross_attn"}


def test_the_owners_class_decides_over_its_name():
    infos = [
        ParamInfo(name="blocks.0.attn.to_q.weight", shape=(4, 4), owner_class="Linear"),
        ParamInfo(name="blocks.0.norm1.weight", shape=(4, 4), owner_class="Linear"),
        ParamInfo(name="blocks.1.attn.to_q.weight", shape=(4, 4), owner_class="Linear"),
        ParamInfo(name="cap_embedder.0.weight", shape=(4,), owner_class="RMSNorm"),
        ParamInfo(name="in_layers.0.weight", shape=(4,), owner_class="GroupNorm"),
        ParamInfo(name="time.ada.weight", shape=(4, 4), owner_class="AdaLayerNormZero"),
    ]
    got = [
        e.component
        for e in build_plan(
            infos, config(component_lr={**RATES, "modulation": 1e-6})
        ).entries.values()
    ]
    assert got == ["self_attn", "modulation", "self_attn", "norm", "norm", "default"]


# Components and rules


def test_fine_components_are_opt_in():
    shapes = census.shapes("flux1_dev")
    name = "transformer_blocks.0.norm1.linear.weight"
    assert build_plan(shapes, config()).entries[name].component == "norm"
    fine = build_plan(shapes, config(component_lr={**RATES, "modulation": 1e-5})).entries
    assert (fine[name].component, fine[name].base_lr) == ("modulation", 1e-5)
    assert fine["transformer_blocks.0.attn.norm_q.weight"].component == "norm"
    for key, example in {
        "head": "proj_out.weight",
        "embed": "x_embedder.weight",
        "fused": "single_transformer_blocks.0.proj_out.weight",
    }.items():
        assert build_plan(shapes, config()).entries[example].component == "default"
        assert (
            build_plan(shapes, config(component_lr={**RATES, key: 1e-5})).entries[example].component
            == key
        )
    conv = build_plan(census.shapes("sd15"), config(component_lr={**RATES, "conv": 1e-5})).entries
    assert conv["down_blocks.0.resnets.0.conv1.weight"].component == "conv"


def test_user_patterns_are_asked_first_and_the_first_match_wins():
    patterns = [
        {"match": "blocks.0.attn1", "component": "norm"},
        {"match": "re:attn", "component": "ffn"},
    ]
    plan = build_plan(toy(), config(patterns=patterns, depth_strategy="flat"))
    assert plan.entries["blocks.0.attn1.to_q.weight"].component == "norm"
    assert plan.entries["blocks.1.attn1.to_q.weight"].component == "ffn"
    assert plan.entries["blocks.0.norm1.weight"].component == "norm"
    assert plan.entries["blocks.1.attn1.to_q.weight"].rule == "pattern 're:attn'"


def test_a_pattern_may_name_a_component_of_the_users_own():
    plan = build_plan(
        toy(),
        config(
            component_lr={**RATES, "mine": 1e-6},
            patterns=[{"match": "proj_out", "component": "mine"}],
        ),
    )
    assert (plan.entries["proj_out.weight"].component, plan.entries["proj_out.weight"].lr) == (
        "mine",
        1e-6,
    )


def test_a_custom_rule_is_one_line(monkeypatch):
    monkeypatch.setattr(components_module, "_CUSTOM_RULES", [])
    monkeypatch.setattr(components_module, "_CUSTOM_COMPONENTS", set())
    with pytest.raises(ConfigError, match="'moe'"):
        build_plan(toy(), config(component_lr={**RATES, "moe": 1e-6}))
    register_component_rule(
        lambda p: "moe" if p.name == "blocks.1.ffn.net.2.weight" else None, components=("moe",)
    )
    plan = build_plan(toy(), config(component_lr={**RATES, "moe": 1e-6}, depth_strategy="flat"))
    assert [e.name for e in plan.entries.values() if e.component == "moe"] == [
        "blocks.1.ffn.net.2.weight"
    ]
    first = config(
        component_lr={**RATES, "moe": 1e-6}, patterns=[{"match": "*.ffn", "component": "norm"}]
    )
    assert build_plan(toy(), first).entries["blocks.1.ffn.net.2.weight"].component == "norm"


# LoRA+, regions, weight decay


def test_lora_plus_multiplies_b_only():
    lora = {
        f"blocks.{i}.attn1.to_q.lora_{s}.default.weight": (8, 8) for i in range(2) for s in "AB"
    }
    plan = build_plan(lora, config(lora_plus_ratio=16, depth_strategy="flat"))
    assert list(lrs(plan).values()) == pytest.approx([4e-4, 64e-4] * 2)


def test_a_region_replaces_rates_multiplies_them_and_the_first_match_wins():
    regions = [
        {"match": "blocks.0.attn1", "lr": 1e-6},
        {"match": "blocks.0", "lr_multiplier": 0.5},
        {"match": "blocks.1", "component_lr": {"ffn": 1e-7}, "weight_decay": 0.3},
    ]
    plan = build_plan(toy(), config(regions=regions, depth_strategy="flat", weight_decay=0.1))
    got = lrs(plan)
    assert got["blocks.0.attn1.to_q.weight"] == 1e-6
    assert got["blocks.0.ffn.net.2.weight"] == pytest.approx(1.5e-4)
    assert (got["blocks.1.ffn.net.2.weight"], got["blocks.1.attn1.to_q.weight"]) == (1e-7, 1e-4)
    assert got["blocks.2.ffn.net.2.weight"] == 3e-4
    assert {e.weight_decay for n, e in plan.entries.items() if n.startswith("blocks.1")} == {0.3}
    assert plan.entries["blocks.2.ffn.net.2.weight"].weight_decay == 0.1


def test_a_region_without_depth_of_its_own_is_numbered_with_the_rest():
    plan = build_plan(toy(), config(regions=[{"match": "blocks.2", "lr_multiplier": 2.0}]))
    assert plan.entries["blocks.2.ffn.net.2.weight"].factor == pytest.approx(0.3)
    own = build_plan(toy(), config(regions=[{"match": "blocks.2", "depth_strategy": "flat"}]))
    assert own.entries["blocks.2.ffn.net.2.weight"].factor == 1.0


def test_no_decay_rules_are_shape_owner_and_name():
    cases = {
        "ndim<=1": ["norm1"],
        "norm": ["norm1"],
        "*.ffn": ["ffn"],
        "re:attn[12]": ["attn1", "attn2"],
    }
    for rule, expected in cases.items():
        plan = build_plan(toy(), config(weight_decay=0.1, no_decay=[rule]))
        free = {n.split(".")[2] for n, e in plan.entries.items() if e.weight_decay == 0.0}
        assert sorted(free) == expected
    assert {e.weight_decay for e in build_plan(toy(), config()).entries.values()} == {None}


def test_the_norm_rule_spares_modulation_matrices():
    plan = build_plan(census.shapes("flux1_dev"), config(weight_decay=0.1, no_decay=["norm"]))
    assert plan.entries["transformer_blocks.0.norm1.linear.weight"].weight_decay == 0.1
    assert plan.entries["transformer_blocks.0.attn.norm_q.weight"].weight_decay == 0.0


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
