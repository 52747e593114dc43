"""Groups of trainers of language models: each rule applied by hand to a few names."""

from __future__ import annotations

import re

import pytest

from dist_layerlr.errors import ConfigError
from dist_layerlr.exchange import FORMATS, convert
from dist_layerlr.plan import build_plan

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
SHAPES = {name: (4, 4) for name in NAMES}


def trained(source: str, settings: dict) -> dict[str, tuple[float, float | None]]:
    """{name: (lr, weight decay)} of the converted config."""
    plan = build_plan(SHAPES, convert(source, settings, NAMES).config)
    return {name: (entry.lr, entry.weight_decay) for name, entry in plan.entries.items()}


def test_axolotls_groups_reach_neither_embeddings_nor_norms_and_the_first_one_wins():
    settings = {
        "learning_rate": "2e-5",
        "weight_decay": 0.1,
        "embedding_lr_scale": 0.5,
        "lr_groups": [
            {"name": "zero", "modules": ["layers.0"], "lr": 1e-4},
            {"name": "mlp", "modules": ["mlp.up_proj", "norm", "lm_head"], "lr": 3e-4},
        ],
    }
    assert trained("axolotl", settings) == {
        "model.embed_tokens.weight": (1e-5, 0.0),
        "model.layers.0.self_attn.q_proj.weight": (1e-4, 0.1),
        "model.layers.0.self_attn.q_proj.bias": (2e-5, 0.0),
        "model.layers.0.input_layernorm.weight": (2e-5, 0.0),
        "model.layers.0.mlp.up_proj.weight": (1e-4, 0.1),
        "model.layers.1.mlp.up_proj.weight": (3e-4, 0.1),
        "model.norm.weight": (2e-5, 0.0),
        "lm_head.weight": (1e-5, 0.0),
    }


def axolotl_groups(groups: object) -> dict[str, object]:
    return {"learning_rate": 1e-4, "lr_groups": groups}


@pytest.mark.parametrize("source", ["axolotl", "llamafactory"])
@pytest.mark.parametrize("ratio", [0, "0", None, ""])
def test_a_lora_plus_ratio_of_0_is_none(source: str, ratio: object):
    settings = {"learning_rate": 1e-4, "loraplus_lr_ratio": ratio}
    assert "lora_plus_ratio" not in convert(source, settings).config["per_layer_lr"]


@pytest.mark.parametrize("source", ["axolotl", "llamafactory"])
def test_lora_plus_multiplies_b_but_for_an_embeddings(source: str):
    names = ["a.q.lora_A.default.weight", "a.q.lora_B.default.weight", "e.lora_embedding_B.default"]
    found = convert(source, {"learning_rate": 1e-4, "loraplus_lr_ratio": 16}, names)
    plan = build_plan({name: (4, 4) for name in names}, found.config)
    rates = [entry.lr for entry in plan.entries.values()]
    assert rates == pytest.approx([1e-4, 1.6e-3, 1e-6], rel=1e-12)


def test_swift_takes_the_aligner_out_of_the_tower():
    names = ["visual.blocks.0.w", "visual.merger.w", "model.layers.0.w", "visuals.w"]
    settings = {
        "learning_rate": 1e-4,
        "vit_lr": 1e-5,
        "aligner_lr": 5e-5,
        "vision_tower": ["visual"],
        "aligner": ["visual.merger"],
    }
    plan = build_plan({n: (2, 2) for n in names}, convert("ms-swift", settings, names).config)
    assert [plan.entries[name].lr for name in names] == [1e-5, 5e-5, 1e-4, 1e-4]
    del settings["aligner"]
    with pytest.raises(ConfigError, match="Missing aligner in the settings"):
        convert("ms-swift", settings)


def test_torchtitans_first_pattern_wins():
    rows = [
        {"pattern": r"embed|lm_head", "lr": 1e-3, "weight_decay": 0.0},
        {"pattern": r"norm", "lr": 5e-4, "weight_decay": 0.0},
        {"pattern": r".*", "lr": 8e-4, "weight_decay": 0.1},
    ]
    expected = {}
    for name in NAMES:
        row = next(row for row in rows if re.search(row["pattern"], name))
        expected[name] = (row["lr"], row["weight_decay"])
    assert trained("torchtitan", {"optimizers": rows}) == expected
    mixed = [{**rows[0], "name": "Muon"}, {**rows[2], "name": "AdamW"}]
    with pytest.raises(ConfigError, match="several name"):
        convert("torchtitan", {"optimizers": mixed})


@pytest.mark.parametrize(
    ("source", "settings", "says"),
    [
        ("axolotl", {"learning_rate": 1e-4, "loraplus_lr_ratio": 4, "lr_groups": [1]}, "twice"),
        ("llamafactory", {"learning_rate": 1e-4, "use_galore": True}, "GaLore"),
        ("axolotl", {"learning_rate": "fast"}, "learning_rate='fast': must be a number"),
        ("timm", {"layer_decay": 0.5}, "Missing lr in the settings"),
        ("timm", {"lr": 1e-3, "layer_decay": 0.5, "layer_decay_no_opt_scale": 0.1}, "freezes"),
        ("torchtitan", {"optimizers": []}, "must be a list of"),
        ("kohya", {"unet_lr": 1e-4, "network_args": ["rank"]}, "KEY=VALUE"),
        # No part of a name would be an expression that every name matches.
        ("axolotl", axolotl_groups([{"modules": [], "lr": 1}]), "lr_groups[0].modules=[]"),
        ("axolotl", axolotl_groups([{"modules": ["a"]}]), "Missing lr in lr_groups[0]"),
        # A mapping is a section elsewhere; lost, all names would train at one rate.
        ("axolotl", axolotl_groups({"a": {"modules": ["a"]}}), "must be a list of groups"),
        ("torchtitan", {"optimizers": [{"lr": 1e-4}]}, "optimizers[0].pattern=None"),
        ("diffusers", {}, f"must be one of {', '.join(FORMATS)}"),
    ],
)
def test_what_cannot_be_said_is_refused_with_its_name(source: str, settings: dict, says: str):
    with pytest.raises(ConfigError) as found:
        convert(source, settings)
    assert says in str(found.value)
