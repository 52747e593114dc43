"""What is printed of a plan: JSON, the startup grid, the derivation of one name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dist_layerlr import build_plan
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.report import explain, grid
from tests.support.plans import config, toy


def test_the_json_has_the_documented_shape():
    plan = build_plan(toy(), config(weight_decay=0.1))
    data = json.loads(plan.to_json())
    assert list(data) == ["digest", "groups", "parameters"]
    assert data["parameters"].keys() == plan.entries.keys()
    keys = ["component", "stack", "block", "blocks", "factor", "lr", "weight_decay", "numel"]
    assert all(list(row) == keys for row in data["parameters"].values())
    assert data["parameters"]["proj_out.weight"] == {
        "component": "default",
        "stack": None,
        "block": None,
        "blocks": None,
        "factor": 1.0,
        "lr": 1e-4,
        "weight_decay": 0.1,
        "numel": 32,
    }
    inside = data["parameters"]["blocks.2.ffn.net.2.weight"]
    assert (inside["stack"], inside["block"], inside["blocks"]) == ("blocks", 2, 3)
    assert sum(g["params"] for g in data["groups"]) == len(plan.entries)
    assert sum(g["numel"] for g in data["groups"]) == sum(
        r["numel"] for r in data["parameters"].values()
    )


HEADER = re.compile(
    r"^\[per_layer_lr\] model_type=\S+ strategy=\w+ min_depth_factor=[\d.]+ groups=\d+"
    r" total_params=\d+$"
)
LINE = re.compile(r"^  ([\w.]+)\.(\d{3})\.(\w+)\s+lr=(\d\.\d{6})  params=(\d+)$")


def test_the_grid_has_the_seeds_format():
    shapes = {
        f"transformer_blocks.{i}.attn.to_{p}.weight": (8, 8) for i in range(12) for p in "qkv"
    }
    shapes |= {f"transformer_blocks.{i}.ff.linear_in.weight": (8, 8) for i in range(12)}
    lines = grid(build_plan(shapes, config())).splitlines()
    assert HEADER.match(lines[0]) and lines[0].endswith(f"total_params={len(shapes)}")
    rows = [
        LINE.match(line) for line in lines[1:] if not line.startswith("[per_layer_lr] warning: ")
    ]
    assert all(rows) and len(rows) == 24
    assert lines[1] == "  transformer_blocks.000.ffn                          lr=0.000300  params=1"
    assert lines[2] == "  transformer_blocks.000.self_attn                    lr=0.000400  params=3"
    for row in rows:
        factor = 1 - int(row[2]) / 11 * 0.7
        assert float(row[4]) == pytest.approx(
            {"ffn": 3e-4, "self_attn": 4e-4}[row[3]] * factor, abs=5.1e-7
        )


def test_the_grid_ends_with_what_is_outside_blocks_and_the_warnings():
    lines = grid(build_plan(toy(), config(component_lr={"ffn": 1e-4}))).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("[per_layer_lr] warning: "))
    assert all(line.startswith("[per_layer_lr] warning: ") for line in lines[first:])
    assert lines[first - 1].startswith("  outside.default")


def folded(shapes: dict[str, tuple[int, ...]], **settings: Any) -> list[str]:
    """The lines of the folded grid, spaces as one."""
    text = grid(build_plan(shapes, config(**settings)), "folded")
    lines = [line for line in text.splitlines()[1:] if "warning" not in line]
    return [" ".join(line.split()) for line in lines]


def test_blocks_fold_into_one_line_where_rates_fall_and_into_two_where_they_rise_first():
    blocks = {f"layers.{i}.attn1.to_{p}.weight": (8, 8) for i in range(41) for p in "qk"}
    settings = {"component_lr": {"self_attn": 4e-4}, "min_depth_factor": 0.3}
    assert folded(blocks, depth_strategy="linear", **settings) == [
        "layers.000-040.self_attn lr=0.000400 .. 0.000120 blocks=41 params=82"
    ]
    assert folded(blocks, depth_strategy="flat", **settings) == [
        "layers.000-040.self_attn lr=0.000400 blocks=41 params=82"
    ]
    assert folded(blocks, depth_strategy="inverted_u", **settings) == [
        "layers.000-020.self_attn lr=0.000120 .. 0.000400 blocks=21 params=42",
        "layers.021-040.self_attn lr=0.000399 .. 0.000120 blocks=20 params=40",
    ]


def test_a_fold_ends_where_blocks_are_missing_or_rates_of_a_cell_part():
    some = {f"layers.{i}.ffn.net.weight": (8, 8) for i in (0, 1, 2, 4, 5)}
    flat = {"component_lr": {"ffn": 1e-4}, "depth_strategy": "flat"}
    assert [line.split()[0] for line in folded(some, **flat)] == [
        "layers.000-002.ffn",
        "layers.004-005.ffn",
    ]
    # A region raises the rate of one parameter of block 2: its cell has two rates, alone in that.
    apart = {f"layers.{i}.ffn.{n}.weight": (8, 8) for i in range(5) for n in "ab"}
    lines = folded(apart, **flat, regions=[{"match": "layers.2.ffn.a", "lr_multiplier": 2}])
    assert lines == [
        "layers.000-001.ffn lr=0.000100 blocks=2 params=4",
        "layers.002.ffn lr=0.000100 .. 0.000200 params=2",
        "layers.003-004.ffn lr=0.000100 blocks=2 params=4",
    ]


def test_a_fold_of_cells_with_several_rates_keeps_first_and_last_block_apart():
    apart = {f"layers.{i}.ffn.{n}.weight": (8, 8) for i in range(3) for n in "ab"}
    twice = [{"match": "re:ffn.a", "lr_multiplier": 2}]
    lines = folded(apart, component_lr={"ffn": 4e-4}, depth_strategy="linear", regions=twice)
    assert lines == [
        "layers.000-002.ffn lr=(0.000400 .. 0.000800) .. (0.000120 .. 0.000240) blocks=3 params=6"
    ]


def test_the_folded_grid_counts_what_the_full_one_counts():
    plan = build_plan(toy(), config())

    def total(text: str) -> int:
        return sum(int(number) for number in re.findall(r"(?<!_)params=(\d+)", text))

    assert total(grid(plan, "folded")) == total(grid(plan)) == len(plan.entries)
    assert len(grid(plan, "folded").splitlines()) < len(grid(plan).splitlines())


def test_warnings_say_what_to_write_to_change_the_rate():
    shapes = {"blocks.0.ffn.net.weight": (8, 8), "blocks.0.attn1.to_q.weight": (8, 8)}
    text = grid(build_plan(shapes, config(component_lr={"ffn": 1e-4})))
    assert 'to change it, add "self_attn": LR to component_lr' in text
    text = grid(build_plan({**shapes, "odd.weight": (8, 8)}, config()))
    assert 'write "patterns": [{"match": "odd.weight", "component": "..."}]' in text


def test_a_plan_that_is_off_prints_one_line():
    assert (
        grid(build_plan(toy(), {"model_type": "wan", "learning_rate": 2e-4}))
        == "[per_layer_lr] model_type=wan off: flat lr=0.000200 total_params=14"
    )


def test_rates_too_small_for_six_decimals_keep_three_digits():
    text = grid(
        build_plan(toy(1), config(component_lr={"ffn": 1.234e-6, "norm": 0.0}, default_lr=2.5e-5))
    )
    assert "lr=1.234e-06" in text and "lr=0.000025" in text and "lr=0.000000  params=1" in text


def test_explain_gives_every_factor():
    plan = build_plan(toy(), config(regions=[{"match": "blocks.2", "lr_multiplier": 0.5}]))
    text = explain(plan, "base_model.model.blocks.2.attn2.to_q.weight")
    lines = {line.strip().partition("  ")[0]: line for line in text.splitlines()}
    assert text.splitlines()[0] == "blocks.2.attn2.to_q.weight"
    assert (
        "8x8 (64 elements)" in lines["shape"]
        and "cross_attn: segment 'attn2'" in lines["component"]
    )
    assert "container 'blocks', block 2 of 3" in lines["place"] and lines["region"].endswith(
        "blocks.2"
    )
    assert (
        lines["base lr"].endswith("0.0002")
        and " 0.3 " in lines["depth factor"]
        and " 0.5 " in lines["multiplier"]
    )
    assert lines["lr"].split()[-1] == "3e-05" and lines["weight decay"].endswith("the optimizer's")


def test_explain_of_an_unknown_name_offers_the_nearest():
    with pytest.raises(
        ModelSourceError, match=r"'blocks.2.attn2.to_k.weight'.*blocks.2.attn2.to_q.weight"
    ):
        explain(build_plan(toy(), config()), "blocks.2.attn2.to_k.weight")
