"""Layer decay at the absolute rates of RF-DETR, and what the seed's rule says of a ViT."""

from __future__ import annotations

import pytest

from dist_layerlr import ConfigError, build_plan
from dist_layerlr.plan import ParamInfo
from dist_layerlr.plan.depth import DepthSettings
from tests.unit.plan.test_layer_decay import VECTOR, factors, vit

# RF-DETR, absolute learning rates


def rfdetr(layers: int) -> list[ParamInfo]:
    encoder = "backbone.0.encoder.encoder."
    names = [
        f"{encoder}embeddings.{part}"
        for part in ("cls_token", "position_embeddings", "patch_embeddings.weight")
    ]
    names += [
        f"{encoder}encoder.layer.{i}.attention.attention.query.{k}"
        for i in range(layers)
        for k in ("weight", "bias")
    ]
    names += [f"{encoder}layernorm.weight", "backbone.0.projector.stages.0.0.cv1.conv.weight"]
    names += [f"transformer.decoder.layers.{i}.self_attn.in_proj_weight" for i in range(3)]
    names += ["transformer.decoder.norm.weight", "class_embed.weight", "query_feat.weight"]
    return [ParamInfo(name=name, shape=VECTOR) for name in names]


ENCODER = "backbone.0.encoder.encoder."
EMBED, FIRST, LAST_BLOCK, FINAL = (
    ENCODER + x for x in ("embeddings.", "encoder.layer.0.", "encoder.layer.11.", "layernorm.")
)
REST = {
    "transformer.decoder.": 7e-5,
    "backbone.0.projector.": 1e-4,
    "class_embed": 1e-4,
    "query_feat": 1e-4,
}
RFDETR_ROWS = [
    (
        "rfdetr",
        [2, 5, 8, 11],
        {EMBED: 4.04071e-6, FIRST: 5.05088e-6, LAST_BLOCK: 5.88e-5, FINAL: 7.35e-5},
    ),
    (
        "rfdetr",
        [3, 6, 9, 12],
        {EMBED: 3.23256e-6, FIRST: 4.04071e-6, LAST_BLOCK: 4.704e-5, FINAL: 7.35e-5},
    ),
    # The seed's text: no factor lr_component_decay squared, L is the number of blocks.
    ("seed", None, {EMBED: 8.24634e-6, FIRST: 1.030792e-5, LAST_BLOCK: 1.2e-4, FINAL: 1.5e-4}),
    (
        "seed",
        [3, 6, 9, 12],
        {EMBED: 6.59707e-6, FIRST: 8.24634e-6, LAST_BLOCK: 9.6e-5, FINAL: 1.5e-4},
    ),
]


@pytest.mark.parametrize(("convention", "indexes", "encoder"), RFDETR_ROWS)
def test_rfdetr_rates_are_absolute(
    convention: str, indexes: list[int] | None, encoder: dict[str, float]
):
    block = {"enabled": True, "preset": "rfdetr", "convention": convention}
    if indexes:
        block["out_feature_indexes"] = indexes
    plan = build_plan(rfdetr(12), {"learning_rate": 1e-4, "per_layer_lr": block})
    for prefix, lr in (encoder | REST).items():
        found = [e.lr for e in plan.entries.values() if e.name.startswith(prefix)]
        assert found == pytest.approx([lr] * len(found), rel=3e-6) and found, prefix


def test_rfdetr_regions_fit_the_names_of_transformers_too():
    encoder = "model.backbone.backbone."
    names = [f"{encoder}encoder.layer.{i}.attention.q_proj.weight" for i in range(2)]
    names += [
        f"{encoder}embeddings.cls_token",
        f"{encoder}layernorm.weight",
        "model.backbone.projector.conv.weight",
    ]
    names += [
        "model.decoder.layers.0.mlp.fc1.weight",
        "model.enc_output.0.weight",
        "my_decoder.weight",
    ]
    config = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, "preset": "rfdetr"}}
    plan = build_plan([(name, VECTOR) for name in names], config)
    expected = [1.5e-4 * 0.8**2, 1.5e-4 * 0.8, 1.5e-4 * 0.8**3, 1.5e-4, 1e-4, 7e-5, 1e-4, 1e-4]
    assert [e.lr for e in plan.entries.values()] == pytest.approx(expected, rel=1e-12)


SPELLINGS = {
    "blocks": ["backbone.0.pos_embed", "backbone.0.patch_embed.proj.weight"],
    "layer": ["backbone.0.embeddings.cls_token", "backbone.0.embeddings.patch_embeddings.weight"],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_seed_rule_reads_both_spellings_of_a_vit(spelling: str):
    """The quoted function, on LW-DETR's names as it stands and on DINOv2's with the words
    changed."""
    names = [
        *SPELLINGS[spelling],
        *(f"backbone.0.encoder.{spelling}.{k}.attn.qkv.weight" for k in range(4)),
    ]
    names += ["backbone.0.norm.weight", "head.weight"]
    region = {"match": "backbone", "lr": 1e-3, "depth_strategy": "layer_decay", "layer_decay": 0.7}
    block = {"enabled": True, "component_lr": {}, "depth_strategy": "flat", "regions": [region]}
    plan = build_plan(
        [(name, VECTOR) for name in names], {"learning_rate": 1e-4, "per_layer_lr": block}
    )
    expected = [*(1e-3 * 0.7**power for power in (5, 5, 4, 3, 2, 1, 0)), 1e-4]
    assert [e.lr for e in plan.entries.values()] == pytest.approx(expected, rel=1e-12)


def test_residual_branches_of_the_seed_rule_are_not_decayed():
    names = [f"backbone.blocks.{k}.attn.qkv.weight" for k in range(3)] + [
        "backbone.blocks.1.residual.attn.weight"
    ]
    got = factors([ParamInfo(name=n, shape=VECTOR) for n in names], DepthSettings(layer_decay=0.5))
    assert list(got.values()) == [0.125, 0.25, 0.5, 1.0]


def test_a_third_party_log_line_is_reproduced():
    """LW-DETR issue 12 prints block 0 of ten with `lr_decay: 0.02824752489999998`."""
    names = [f"backbone.0.encoder.blocks.{k}.attn.qkv.weight" for k in range(10)]
    got = factors([ParamInfo(name=n, shape=VECTOR) for n in names], DepthSettings(layer_decay=0.7))
    assert got[names[0]] == pytest.approx(0.02824752489999998, rel=1e-14)


def test_a_given_minimum_is_a_floor_of_layer_decay():
    got = factors(vit("head.weight"), DepthSettings(layer_decay=0.5, min_depth_factor=0.1))
    assert min(got.values()) == 0.1 and got["blocks.11.ls1.gamma"] == 0.5


def test_a_scope_without_blocks_is_refused():
    block = {"enabled": True, "component_lr": {}, "depth_strategy": "layer_decay"}
    with pytest.raises(ConfigError, match="layer_decay.*found no transformer blocks"):
        build_plan({"a.weight": (2, 2)}, {"per_layer_lr": block})
