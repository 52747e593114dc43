"""The plan as a whole: groups, digest, rules in order, stacks and warnings."""

from __future__ import annotations

import random

import pytest

from dist_layerlr import ConfigError, build_plan, plan_diff, register_component_rule
from dist_layerlr.plan import ParamInfo
from dist_layerlr.plan import components as components_module
from tests.support import census
from tests.support.plans import RATES, config, lrs, toy

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
