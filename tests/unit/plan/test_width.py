"""Rates scaled by shapes: the tables of muP and CompleteP, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_layerlr import ConfigError, build_plan, plan_diff
from dist_layerlr.plan import ParamInfo
from dist_layerlr.report import explain

LR, DECAY, EPS = 3e-3, 0.1, 1e-8
Sizes = dict[str, tuple[int, ...]]


def model(width: int, blocks: int, vocabulary: int = 50) -> Sizes:
    """Names and shapes of a LLaMA-like model."""
    inner = {
        "self_attn.q_proj.weight": (width, width),
        "self_attn.q_proj.bias": (width,),
        "mlp.down_proj.weight": (width, 3 * width),
        "input_layernorm.weight": (width,),
    }
    stack = {f"model.layers.{i}.{n}": s for i in range(blocks) for n, s in inner.items()}
    ends = {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    return {"model.embed_tokens.weight": (vocabulary, width), **stack, **ends}


def tsv(path: Path, sizes: Sizes) -> str:
    lines = [f"{name}\t{'x'.join(map(str, shape))}" for name, shape in sizes.items()]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def config(base: str, **given: Any) -> dict[str, Any]:
    block = {"enabled": True, "default_lr": LR, "component_lr": {}, "weight_decay": DECAY}
    block |= {"depth_strategy": "flat"}
    return {"per_layer_lr": block, "width_scaling": {"base": base, **given}}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return tsv(tmp_path / "small.tsv", model(64, 2))


BLOCK = "model.layers.7."


@pytest.mark.parametrize(
    ("name", "lr", "decay"),
    [
        ("model.embed_tokens.weight", 1, 1),
        (BLOCK + "self_attn.q_proj.weight", 1 / 4, 4),
        (BLOCK + "mlp.down_proj.weight", 1 / 4, 4),
        (BLOCK + "self_attn.q_proj.bias", 1, 1),
        (BLOCK + "input_layernorm.weight", 1, 1),
        ("model.norm.weight", 1, 1),
        ("lm_head.weight", 1 / 4, 4),
    ],
)
def test_mup_divides_the_rate_of_matrices_by_the_growth_of_their_fan_in(
    base: str, name: str, lr: float, decay: float
) -> None:
    plan = build_plan(model(256, 8), config(base))
    entry = plan.entries[name]
    assert entry.lr == pytest.approx(LR * lr, rel=1e-12)
    assert entry.weight_decay == pytest.approx(DECAY * decay, rel=1e-12)
    assert entry.eps is None


@pytest.mark.parametrize(
    ("name", "lr", "decay", "eps"),
    [
        ("model.embed_tokens.weight", 1, 1, 1 / 4),
        (BLOCK + "self_attn.q_proj.weight", 1 / 4 * 4**-0.25, 4, 1 / 4 * 4**-0.75),
        (BLOCK + "self_attn.q_proj.bias", 4**-0.25, 1, 1 / 4 * 4**-0.75),
        (BLOCK + "input_layernorm.weight", 4**-0.25, 1, 1 / 4 * 4**-0.75),
        ("model.norm.weight", 1, 1, 1 / 4),
        ("lm_head.weight", 1 / 4, 4, 1 / 4),
    ],
)
def test_completep_scales_blocks_by_the_growth_of_their_number_too(
    base: str, name: str, lr: float, decay: float, eps: float
) -> None:
    given = config(base, rule="completep", alpha=0.75, eps=EPS)
    entry = build_plan(model(256, 8), given).entries[name]
    assert entry.lr == pytest.approx(LR * lr, rel=1e-12)
    assert entry.weight_decay == pytest.approx(DECAY * decay, rel=1e-12)
    assert entry.eps == pytest.approx(EPS * eps, rel=1e-12)


def test_the_base_model_itself_keeps_its_rates(base: str) -> None:
    given = config(base, rule="completep", eps=EPS)
    scaled = build_plan(model(64, 2), given)
    plain = build_plan(model(64, 2), {"per_layer_lr": given["per_layer_lr"]})
    assert {n: e.lr for n, e in scaled.entries.items()} == {
        n: e.lr for n, e in plain.entries.items()
    }
    assert {e.eps for e in scaled.entries.values()} == {EPS}


def test_one_flat_rate_is_scaled_too(base: str) -> None:
    given = {"learning_rate": LR, "per_layer_lr": {"enabled": False}}
    plan = build_plan(model(256, 2), {**given, "width_scaling": {"base": base}})
    assert plan.entries["lm_head.weight"].lr == pytest.approx(LR / 4, rel=1e-12)
    assert plan.entries["model.norm.weight"].lr == LR


def test_convolutions_count_their_kernel_and_gpt2s_conv1d_its_first_dimension(
    tmp_path: Path,
) -> None:
    small = {"blocks.0.attn.c.weight": (8, 24), "blocks.1.attn.c.weight": (8, 24)}
    small |= {"blocks.0.conv.weight": (8, 4, 3, 3), "blocks.1.conv.weight": (8, 4, 3, 3)}
    base = tsv(tmp_path / "small.tsv", small)
    infos = [
        ParamInfo(name="blocks.0.attn.c.weight", shape=(16, 72), owner_class="Conv1D"),
        ParamInfo(name="blocks.0.conv.weight", shape=(8, 12, 3, 3), owner_class="Conv2d"),
        ParamInfo(name="blocks.1.attn.c.weight", shape=(16, 72), owner_class="Linear"),
    ]
    plan = build_plan(infos, config(base))
    factors = [e.lr / LR for e in plan.entries.values()]
    assert factors == [pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_a_table_of_vectors_is_told_by_its_class_where_there_is_one(tmp_path: Path) -> None:
    base = tsv(tmp_path / "small.tsv", {"wte.weight": (50, 8), "blocks.0.attn.q.weight": (8, 8)})
    info = ParamInfo(name="wte.weight", shape=(50, 32), owner_class="Embedding")
    assert build_plan([info], config(base)).entries["wte.weight"].lr == LR
    info = ParamInfo(name="wte.weight", shape=(50, 32), owner_class="Linear")
    assert build_plan([info], config(base)).entries["wte.weight"].lr == pytest.approx(LR / 4)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"base": "none.tsv"}, "width_scaling.base='none.tsv': Cannot read model"),
        ({}, "Invalid width_scaling: 'base'"),
        ({"base": "BASE", "rule": "sp"}, "width_scaling.rule='sp'"),
        ({"base": "BASE", "alpha": 2}, "width_scaling.alpha=2"),
        ({"base": "BASE", "eps": 0}, "width_scaling.eps=0"),
        ({"base": "BASE", "widths": 1}, "widths"),
    ],
    ids=str,
)
def test_a_wrong_block_is_refused(base: str, given: dict[str, Any], text: str) -> None:
    block = {k: base if v == "BASE" else v for k, v in given.items()}
    with pytest.raises(ConfigError) as error:
        build_plan(model(256, 2), {**config(base), "width_scaling": block})
    assert text in str(error.value)


def test_names_and_dimensions_that_the_base_does_not_have_are_refused(base: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.extra\.weight \(4, 4\) is not in it"):
        build_plan({**model(256, 2), "model.extra.weight": (4, 4)}, config(base))
    with pytest.raises(ConfigError, match=r"lm_head\.weight \(50,\) is \(50, 64\) there"):
        build_plan({**model(256, 2), "lm_head.weight": (50,)}, config(base))


def test_beside_several_optimizers_it_is_refused(base: str) -> None:
    several = {"optimizers": {"muon": {}, "adamw": "rest"}}
    with pytest.raises(ConfigError, match="its rules are Adam's"):
        build_plan(model(256, 2), {**config(base), **several})


def test_the_digest_the_diff_and_explain_tell_an_epsilon(base: str) -> None:
    plain, scaled = (build_plan(model(64, 2), config(base, eps=eps)) for eps in (1e-8, 1e-9))
    assert plain.digest != scaled.digest
    assert any("eps 1e-08 -> 1e-09" in line for line in plan_diff(plain, scaled))
    wide = build_plan(model(256, 8), config(base, rule="completep", eps=EPS))
    text = explain(wide, BLOCK + "self_attn.q_proj.weight")
    assert "lr x 0.25, decay x 4: completep: fan-in x 4, depth x 4" in text
    assert "epsilon       6.25e-10" in text
