"""Layer decay against the tables that other projects' own tests expect, and numbers from running
their code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from dist_layerlr import build_plan
from dist_layerlr.plan import ParamInfo
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.layer_decay import layer_decay_factors
from dist_layerlr.plan.names import parse
from dist_layerlr.plan.stacks import StackMap

MATRIX, VECTOR = (3, 3, 1, 1), (3,)


def conv(name: str) -> list[ParamInfo]:
    return [
        ParamInfo(name=f"{name}.weight", shape=MATRIX),
        ParamInfo(name=f"{name}.bias", shape=VECTOR),
    ]


def norm(name: str) -> list[ParamInfo]:
    return [
        ParamInfo(name=f"{name}.weight", shape=VECTOR),
        ParamInfo(name=f"{name}.bias", shape=VECTOR),
    ]


def vector(name: str, *, trainable: bool = True) -> list[ParamInfo]:
    return [ParamInfo(name=name, shape=(1,), trainable=trainable)]


def join(parts: Iterable[list[ParamInfo]]) -> list[ParamInfo]:
    return [info for part in parts for info in part]


def toy_vit(tokens: Iterable[str], layers: int, head: str) -> list[ParamInfo]:
    """The toy of MMPretrain's and MMSegmentation's tests: tokens, then layers, then a head outside
    the backbone."""
    return join(
        [
            *(vector(f"backbone.{token}") for token in tokens),
            *(conv(f"backbone.layers.{i}") for i in range(layers)),
            conv(head),
        ]
    )


MMPRETRAIN = toy_vit(["cls_token", "pos_embed"], 2, "head")
MMSEG = toy_vit(["cls_token", "patch_embed"], 3, "decode_head")
CONVNEXT = join(
    [
        *(
            vector(f"backbone.{name}")
            for name in ("cls_token", "mask_token", "pos_embed", "stem_norm")
        ),
        vector("backbone.lin", trainable=False),
        *(
            [*conv(f"backbone.stages.{i}.0.conv"), *norm(f"backbone.stages.{i}.0.bn")]
            for i in range(4)
        ),
        norm("backbone.norm0"),
        norm("backbone.downsample_norm0"),
        norm("backbone.downsample_norm1"),
        *(conv(f"backbone.downsample_layers.{i}.0") for i in range(4)),
        conv("head"),
    ]
)

STAGE_WISE = [
    (0, 128),
    (0, 1),
    (0.05, 64),
    (0, 64),
    (0.05, 32),
    (0, 32),
    (0.05, 16),
    (0, 16),
    (0.05, 8),
    (0, 8),
]
LAYER_WISE = [*STAGE_WISE[:8], (0.05, 2), (0, 2)]
LAST = [(0.05, 128), (0.05, 1)]
MMSEG_GROUPS = [(0, 16), (0.05, 8), (0, 8), (0.05, 4), (0, 4), (0.05, 2), (0, 2), (0.05, 1), (0, 1)]


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """Groups (weight decay, scale at rate 2) in the order in which parameters first need them."""

    model: list[ParamInfo]
    groups: list[tuple[float, float]]
    convention: str
    num_layers: int | None = None


ORACLES = {
    "mmpretrain vit": Oracle(
        model=MMPRETRAIN,
        convention="beit",
        groups=[(0, 8), (0.05, 4), (0, 4), (0.05, 2), (0, 2), (0.05, 1), (0, 1)],
    ),
    "mmseg beit and mae": Oracle(model=MMSEG, convention="beit", groups=MMSEG_GROUPS),
    "mmseg through mmdet": Oracle(model=MMSEG, convention="mmdet", groups=MMSEG_GROUPS),
    "mmdet convnext, stage-wise": Oracle(
        model=CONVNEXT, convention="mmdet_stage", num_layers=6, groups=STAGE_WISE + LAST
    ),
    "mmdet convnext, layer-wise": Oracle(
        model=CONVNEXT, convention="mmdet", num_layers=6, groups=LAYER_WISE + LAST
    ),
}
# What the projects' tests call "bias_decay 0 and 1-d parameters 0": two ways to say it here.
NO_DECAY = [["ndim<=1"], ["*.bias", "re:token$|pos_embed$|patch_embed$|norm|bn"]]


def factors(model: list[ParamInfo], settings: DepthSettings) -> dict[str, float]:
    """Factors straight from the module, whose rate may exceed 1."""
    paths = [parse(info.name) for info in model]
    stacks = StackMap(paths)
    values = layer_decay_factors(
        [(path, stacks.locate(path)) for path in paths],
        rate=settings.layer_decay,
        convention=settings.convention,
        num_layers=settings.num_layers,
        floor=settings.min_depth_factor or 0.0,
    )
    return {info.name: value for info, value in zip(model, values, strict=True)}


@pytest.mark.parametrize("case", ORACLES.values(), ids=ORACLES.keys())
def test_scales_at_rate_two_are_those_of_the_projects_tests(case: Oracle):
    settings = DepthSettings(
        depth_strategy="layer_decay",
        layer_decay=2.0,
        convention=case.convention,
        num_layers=case.num_layers,
    )
    got = factors(case.model, settings)
    groups = dict.fromkeys(
        (0.05 if len(i.shape) > 1 else 0, got[i.name]) for i in case.model if i.trainable
    )
    assert list(groups) == case.groups


@pytest.mark.parametrize("no_decay", NO_DECAY, ids=["by true shape", "by name"])
@pytest.mark.parametrize("case", ORACLES.values(), ids=ORACLES.keys())
def test_plans_at_rate_one_half_have_the_projects_weight_decays_and_inverse_scales(
    case: Oracle, no_decay: list[str]
):
    block = {
        "enabled": True,
        "component_lr": {},
        "default_lr": 1.0,
        "depth_strategy": "layer_decay",
        "layer_decay": 0.5,
        "convention": case.convention,
        "weight_decay": 0.05,
        "no_decay": no_decay,
        "unmatched": "default",
    }
    if case.num_layers:
        block["num_layers"] = case.num_layers
    plan = build_plan(case.model, {"per_layer_lr": block})
    groups = dict.fromkeys((e.weight_decay, 1 / e.lr) for e in plan.entries.values())
    assert list(groups) == case.groups
    assert plan.frozen == sum(not info.trainable for info in case.model)


# A ViT of 12 blocks, rows of section 5.7: embed, block 0, block 11, final norm, head.


def vit(*extra: str, prefix: str = "") -> list[ParamInfo]:
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    parts = (
        "norm1.weight",
        "attn.qkv.weight",
        "attn.proj.bias",
        "ls1.gamma",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    )
    names += [f"blocks.{i}.{part}" for i in range(12) for part in parts]
    names += ["norm.weight", "norm.bias", *extra]
    return [ParamInfo(name=prefix + name, shape=VECTOR) for name in names]


@dataclass(frozen=True, kw_only=True)
class Row:
    model: list[ParamInfo]
    rate: float
    convention: str
    expected: dict[str, float]


ROWS = {
    "timm .75, head": Row(
        model=vit("head.weight", "head.bias"),
        rate=0.75,
        convention="timm",
        expected={
            "cls_token": 0.023757,
            "patch_embed.": 0.023757,
            "pos_embed": 0.023757,
            "blocks.0.": 0.031676,
        }
        | {"blocks.11.": 0.75, "norm.": 0.75, "head.": 1.0},
    ),
    "timm .75, no head": Row(
        model=vit(),
        rate=0.75,
        convention="timm",
        expected={
            "cls_token": 0.031676,
            "patch_embed.": 0.031676,
            "blocks.0.": 0.042235,
            "blocks.11.": 1.0,
            "norm.": 1.0,
        },
    ),
    "timm .75, no head, one unmatched token": Row(
        model=vit("other_token"),
        rate=0.75,
        convention="timm",
        expected={
            "cls_token": 0.023757,
            "blocks.0.": 0.031676,
            "blocks.11.": 0.75,
            "norm.": 0.75,
            "other_token": 1.0,
        },
    ),
    "DINOv3 .9": Row(
        model=vit("storage_tokens", "mask_token", "head.weight"),
        rate=0.9,
        convention="dinov3",
        expected={
            "cls_token": 0.254187,
            "storage_tokens": 0.254187,
            "mask_token": 0.254187,
            "pos_embed": 0.254187,
        }
        | {
            "patch_embed.": 0.050837,
            "blocks.0.": 0.28243,
            "blocks.11.": 0.9,
            "norm.": 1.0,
            "head.": 1.0,
        },
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_vit_factors_are_those_of_the_projects_code(row: Row):
    block = {
        "enabled": True,
        "component_lr": {},
        "default_lr": 1.0,
        "depth_strategy": "layer_decay",
    }
    block |= {"layer_decay": row.rate, "convention": row.convention, "unmatched": "default"}
    if row.convention == "dinov3":
        block["regions"] = [{"match": "patch_embed", "lr_multiplier": 0.2}]
    plan = build_plan(row.model, {"per_layer_lr": block})
    for prefix, expected in row.expected.items():
        found = [e.lr for e in plan.entries.values() if e.name.startswith(prefix)]
        assert found == pytest.approx([expected] * len(found), rel=3e-5) and found, prefix


def test_every_block_of_a_vit_is_one_rate_step_apart():
    for row in ROWS.values():
        got = factors(row.model, DepthSettings(layer_decay=row.rate, convention=row.convention))
        for k in range(11):
            assert got[f"blocks.{k}.ls1.gamma"] == pytest.approx(
                row.rate * got[f"blocks.{k + 1}.ls1.gamma"], rel=1e-12
            )


def timm_layer_ids(names: list[str]) -> dict[str, int]:
    """Layer ids by the group matcher of timm 1.0.31's VisionTransformer, and the top one; written
    from its regexes."""

    def ordinal(name: str) -> tuple[float, ...]:
        if re.match(r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre", name):
            return (0.0,)
        if block := re.match(r"^blocks\.(\d+)", name):
            return (1.0, float(block[1]))
        return (1.0, 99999.0) if re.match(r"^norm", name) else (float("inf"),)

    ids, last = {}, -1
    for key in sorted({ordinal(name) for name in names}):
        last += key[-1] != 99999.0  # the final norm joins the group before it
        ids[key] = last
    return {name: ids[ordinal(name)] for name in names}


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("head.weight", "head.bias"),
        ("reg_token", "head.weight"),
        ("fc_norm.weight", "head.weight"),
        ("norm_pre.weight", "head.weight"),
        ("mask_token", "head.weight"),
    ],
    ids=str,
)
def test_the_timm_convention_is_timms_group_matcher(extra: tuple[str, ...]):
    model = vit(*extra)
    got = factors(model, DepthSettings(layer_decay=0.75, convention="timm"))
    ids = timm_layer_ids([info.name for info in model])
    top = max(ids.values())
    assert got == pytest.approx(
        {name: 0.75 ** (top - layer) for name, layer in ids.items()}, rel=1e-12
    )
