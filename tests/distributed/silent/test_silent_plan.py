"""Silent failures that need no process group: names, shapes, schedulers, loads, and rules of other
projects.

Numbers in the names are the rows of the table of 22 silent failures; `peers` are rules of other
projects. The first test of a row asserts that naive code still fails without an error: when it no
longer passes, upstream mended it. No test runs a backward pass: the same process forks ranks later.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import dist_layerlr
from dist_layerlr.errors import ConfigError, UnmatchedParams
from tests.support.naive import (
    CONFIG,
    RATES,
    config,
    make_model,
    naive_component,
    planned,
    wanted_rates,
)
from tests.support.toys import WIDTH

# --- 10: shapes ---


def test_10_a_meta_model_gives_the_plan_of_the_real_one() -> None:
    with torch.device("meta"):
        shapes_only = make_model()
    rule = config(weight_decay=0.1, no_decay=["ndim<=1"])
    assert (
        dist_layerlr.plan_model(shapes_only, rule).digest
        == dist_layerlr.plan_model(make_model(), rule).digest
    )


# --- 11: names ---


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model)


def blocks_compiled(model: Any) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block)
    return model


def checkpointed(model: Any) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    return model


PREFIXES = {"compiled": compiled, "blocks compiled": blocks_compiled, "checkpointed": checkpointed}


def rule_by_start(name: str) -> float:
    """A user's rule for the first block."""
    return 1e-2 if re.match(r"blocks\.0\.(norm|attn|mlp)", name) else 1e-4


@pytest.mark.parametrize("wrap", PREFIXES)
def test_11_naive_rule_falls_through_to_the_default_once_wrapped(wrap: str) -> None:
    assert {rule_by_start(name) for name, _ in make_model().named_parameters()} == {1e-2, 1e-4}
    assert {rule_by_start(name) for name, _ in PREFIXES[wrap](make_model()).named_parameters()} == {
        1e-4
    }


def test_11_naive_stripping_of_a_prefix_eats_into_module_names() -> None:
    assert "blocks.0.submodule.weight".replace("module.", "") == "blocks.0.subweight"
    assert (
        dist_layerlr.plan.canonical_name("blocks.0.submodule.weight") == "blocks.0.submodule.weight"
    )


@pytest.mark.parametrize("wrap", PREFIXES)
def test_11_a_wrapped_model_has_the_plan_of_the_plain_one(wrap: str) -> None:
    rule = config(
        depth_strategy="linear",
        min_depth_factor=0.5,
        patterns=[{"match": "blocks.0.mlp.*", "component": "self_attn"}],
    )
    plain = dist_layerlr.plan_model(make_model(), rule)
    model = PREFIXES[wrap](make_model())
    plan, optimizer = planned(model, rule)
    assert plan.digest == plain.digest
    dist_layerlr.verify(plain, model, optimizer)
    assert dist_layerlr.optim.read_back(model, optimizer).keys() == wanted_rates().keys()


def test_11_a_name_without_a_rule_is_reported_or_refused() -> None:
    warned = dist_layerlr.plan_model(make_model(), config(unmatched="warn"))
    assert any("emb.weight" in text for text in warned.warnings)
    with pytest.raises(UnmatchedParams, match=r"emb\.weight"):
        dist_layerlr.plan_model(make_model(), config(unmatched="error"))


# --- 12: groups ---


def test_12_no_group_of_a_plan_is_empty_and_names_are_unique() -> None:
    model = make_model()
    for name, param in model.named_parameters():
        param.requires_grad_(".attn." not in name)
    plan = dist_layerlr.plan_model(model, config(depth_strategy="linear"))
    assert all(group.names for group in plan.groups)
    assert len({group.name for group in plan.groups}) == len(plan.groups)
    assert not [name for group in plan.groups for name in group.names if ".attn." in name]


# --- 17: tied weights ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, WIDTH)
        self.blocks = make_model().blocks
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


HEAD_RULE = config(
    patterns=[{"match": "lm_head.weight", "component": "head"}],
    component_lr={"head": 1e-2, "self_attn": 4e-3},
)


def test_17_naive_rule_for_a_tied_head_matches_nothing() -> None:
    names = [name for name, _ in Tied().named_parameters()]
    assert [name for name in names if name.startswith("lm_head")] == []
    assert "embed_tokens.weight" in names


def test_17_a_rule_for_the_name_that_lost_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"lm_head\.weight"):
        dist_layerlr.plan_model(Tied(), HEAD_RULE)


def test_17_tied_names_are_listed_when_their_rules_differ() -> None:
    rule = config(component_lr={"head": 1e-2, "embed": 1e-3, "self_attn": 4e-3})
    plan = dist_layerlr.plan_model(Tied(), rule)
    assert plan.entries["embed_tokens.weight"].lr == 1e-3
    assert any(
        "embed_tokens.weight" in text and "lm_head.weight" in text for text in plan.warnings
    ), plan.warnings


# --- 18: optimizers ---


class Lamb(torch.optim.SGD):
    """Nothing but a name."""


def test_18_optimizers_that_mix_elements_are_refused_whatever_they_are_called() -> None:
    params = list(make_model().parameters())
    renamed = type("AdamW", (torch.optim.Adafactor,), {})
    for optimizer in (torch.optim.Adafactor(params), renamed(params)):
        with pytest.raises(ConfigError, match=f"{type(optimizer).__name__}.* of its move away"):
            dist_layerlr.optim.check_optimizer(optimizer)
    for optimizer in (
        torch.optim.AdamW(params),
        torch.optim.Adam(params),
        torch.optim.SGD(params),
        torch.optim.NAdam(params),
        Lamb(params, lr=1e-3),
    ):
        dist_layerlr.optim.check_optimizer(optimizer)


# --- 21: number of groups ---


def test_21_a_plan_has_one_group_per_distinct_rate_and_decay() -> None:
    model = make_model()
    flat = dist_layerlr.plan_model(model, config(weight_decay=0.1, no_decay=["ndim<=1"]))
    assert len(flat.groups) == 2 * len(RATES) < len(flat.entries)
    deep = dist_layerlr.plan_model(model, config(depth_strategy="linear", min_depth_factor=0.5))
    assert len(deep.groups) == len({entry.lr for entry in deep.entries.values()})


# --- rules of other projects ---


def timm_scales(named: Any, decay: float = 0.75) -> set[float]:
    """timm's layer ids, from its description: what the matcher does not know belongs to the last
    layer."""
    layers = []
    for name, _ in named:
        block = re.match(r"^blocks\.(\d+)", name)
        layers.append(0 if name.startswith("emb.") else 1 + int(block[1]) if block else None)
    last = max((layer for layer in layers if layer is not None), default=0) + 1
    return {decay ** (last - (last if layer is None else layer)) for layer in layers}


def test_peers_naive_timm_rule_on_a_compiled_model_gives_every_name_scale_one() -> None:
    assert len(timm_scales(make_model().named_parameters())) == 5
    assert timm_scales(compiled(make_model()).named_parameters()) == {1.0}


@pytest.mark.parametrize("wrap", PREFIXES)
def test_peers_our_layer_decay_does_not_see_wrappers(wrap: str) -> None:
    rule = config(
        component_lr={},
        default_lr=1.0,
        depth_strategy="layer_decay",
        layer_decay=0.75,
        convention="timm",
    )
    plan = dist_layerlr.plan_model(PREFIXES[wrap](make_model()), rule)
    assert plan.digest == dist_layerlr.plan_model(make_model(), rule).digest
    rates = {
        name.split(".")[1]: entry.lr
        for name, entry in plan.entries.items()
        if name.startswith("blocks.")
    }
    assert rates == pytest.approx({"0": 0.75**3, "1": 0.75**2, "2": 0.75})


KOHYA_WEIGHTS = [0.1 * (i + 1) for i in range(25)]  # 12 down, mid, 12 up; one weight each


def kohya_block(name: str) -> int:
    """kohya's `get_block_index` for SD1.5, from its description: -1 for a name it does not know."""
    found = re.search(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)", name)
    if "mid_block" in name:
        return 12
    if found is None:
        return -1
    return (1 if found[1] == "down" else 13) + 3 * int(found[2]) + int(found[4])


def test_peers_naive_kohya_index_of_an_unknown_name_takes_the_last_blocks_rate() -> None:
    assert (
        KOHYA_WEIGHTS[kohya_block("lora_unet_down_blocks_0_attentions_0_proj_in")]
        == KOHYA_WEIGHTS[1]
    )
    for name in ("lora_unet_conv_in", "lora_unet_time_embedding_linear_1"):
        assert kohya_block(name) == -1
        assert KOHYA_WEIGHTS[kohya_block(name)] == KOHYA_WEIGHTS[24] == max(KOHYA_WEIGHTS)


def test_peers_our_names_outside_blocks_take_no_blocks_factor() -> None:
    unet = {
        "conv_in.weight": (8, 4, 3, 3),
        "time_embedding.linear_1.weight": (8, 8),
        **{
            f"{stage}.attentions.0.transformer_blocks.0.{attention}.to_q.weight": (8, 8)
            for stage in (
                "down_blocks.0",
                "down_blocks.1",
                "mid_block",
                "up_blocks.0",
                "up_blocks.1",
            )
            for attention in ("attn1", "attn2")
        },
    }
    rule = config(
        depth_strategy="linear",
        min_depth_factor=0.2,
        component_lr={"self_attn": 1e-3},
        default_lr=1e-4,
    )
    plan = dist_layerlr.build_plan(unet, rule)
    outside = [plan.entries[name] for name in ("conv_in.weight", "time_embedding.linear_1.weight")]
    assert {(entry.factor, entry.lr, entry.block) for entry in outside} == {(1.0, 1e-4, None)}
    last = plan.entries["up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert last.factor == pytest.approx(0.2)
    adapter = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}.lora_down.weight": (4, 8)
        for name in unet
    }
    flattened = dist_layerlr.build_plan(adapter, rule, base=unet)
    assert {
        entry.factor
        for name, entry in flattened.entries.items()
        if "blocks" not in name and "mid" not in name
    } == {1.0}


def test_the_naive_rule_of_these_tests_means_what_the_plan_means() -> None:
    plan = dist_layerlr.plan_model(make_model(), CONFIG)
    assert {name: entry.lr for name, entry in plan.entries.items()} == wanted_rates()
    assert {naive_component(name) for name in plan.entries} == set(RATES)


def test_every_row_of_the_table_has_a_naive_test_and_one_of_ours() -> None:
    names = [
        name
        for file in Path(__file__).parent.glob("test_silent_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    ]
    for row in range(1, 23):
        own = [
            name.removeprefix(f"test_{row:02}_")
            for name in names
            if name.startswith(f"test_{row:02}_")
        ]
        naive = [name for name in own if name.startswith("naive_")]
        assert naive and len(naive) < len(own), f"row {row}: {own}"
