"""The difference of two plans: what a person wants to see when a run goes on with another
config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_layerlr import build_plan, plan_diff
from dist_layerlr.cli import main
from dist_layerlr.plan.entries import Plan

PARTS = {
    "attn.to_q.weight": (8, 8),
    "attn.to_k.weight": (8, 8),
    "ff.net.2.weight": (8, 8),
    "norm1.weight": (8,),
}
RATES = {"self_attn": 4e-4, "ffn": 3e-4, "norm": 5e-5}


def names(blocks: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"blocks.{i}.{part}": shape for i in range(blocks) for part, shape in PARTS.items()} | {
        "head.weight": (2,)
    }


def config(**block: object) -> dict:
    return {"per_layer_lr": {"enabled": True, "component_lr": RATES, "default_lr": 1e-4, **block}}


def plan(blocks: int = 3, **block: object) -> Plan:
    return build_plan(names(blocks), config(**block))


def test_equal_plans_differ_in_nothing():
    assert plan_diff(plan(), plan()) == []
    assert plan_diff(plan(), json.loads(plan().to_json())["parameters"]) == []


def test_a_component_whose_rate_doubles_is_one_line_over_all_blocks():
    lines = plan_diff(plan(), plan(component_lr={**RATES, "self_attn": 8e-4}))
    assert lines == [
        "blocks.000-002.self_attn: lr 0.00012..0.0004 -> 0.00024..0.0008 (x2), 6 names"
    ]


def test_every_name_can_have_its_own_line():
    lines = plan_diff(plan(), plan(component_lr={**RATES, "self_attn": 8e-4}), every_name=True)
    assert lines[:2] == [
        "blocks.0.attn.to_k.weight: lr 0.0004 -> 0.0008 (x2)",
        "blocks.0.attn.to_q.weight: lr 0.0004 -> 0.0008 (x2)",
    ]
    assert len(lines) == 6


def test_another_depth_curve_is_one_line_for_each_block_that_it_moves():
    lines = plan_diff(plan(depth_strategy="flat"), plan(min_depth_factor=0.5))
    assert [line for line in lines if "self_attn" in line] == [
        "blocks.001.self_attn: lr 0.0004 -> 0.0003 (x0.75), 2 names",
        "blocks.002.self_attn: lr 0.0004 -> 0.0002 (x0.5), 2 names",
    ]


def test_weight_decay_and_a_rate_from_zero_are_shown():
    assert plan_diff(
        plan(component_lr={**RATES, "norm": 0}, depth_strategy="flat"), plan(depth_strategy="flat")
    ) == ["blocks.000-002.norm: lr 0 -> 5e-05, 3 names"]
    assert plan_diff(plan(weight_decay=0.1), plan(weight_decay=0.1, no_decay=["norm"])) == [
        "blocks.000-002.norm: weight decay 0.1 -> 0, 3 names"
    ]
    assert (
        plan_diff(plan(), plan(weight_decay=0.1))[-1]
        == "head.weight: weight decay the optimizer's -> 0.1"
    )


def optimizers(**muon: object) -> Plan:
    given = {**config(), "optimizers": {"muon": muon, "adamw": "rest"}}
    return build_plan({**names(), "blocks.0.attn.qkv.weight": (24, 8)}, given)


def test_a_fused_matrix_that_is_no_longer_split_is_shown():
    split, whole = optimizers(), optimizers(fused="whole")
    wanted = ["blocks.000.self_attn: optimizer muon on parts of 8, 8, 8 rows -> muon"]
    found = plan_diff(split, json.loads(whole.to_json())["parameters"])
    assert [line.replace("blocks.0.attn.qkv.weight", "blocks.000.self_attn") for line in found] == (
        wanted
    )


def test_an_optimizer_that_takes_nothing_is_warned_of_before_training():
    said = optimizers(components=["norm"]).warnings
    assert any("optimizers.muon takes no trainable parameter" in line for line in said)
    assert not any("optimizers." in line for line in optimizers().warnings)


def test_names_that_came_or_went_and_other_sizes_are_shown():
    small, large = plan(3, depth_strategy="flat"), plan(5, depth_strategy="flat")
    came = [
        f"blocks.003-004.{c}: only in the second plan, lr {lr}"
        for c, lr in (("self_attn", 4e-4), ("ffn", 3e-4))
    ]
    assert [line.rpartition(", ")[0] for line in plan_diff(small, large)][:2] == came
    assert all("only in the first plan" in line for line in plan_diff(large, small))
    wider = build_plan(names() | {"head.weight": (3,)}, config())
    assert plan_diff(plan(), wider) == ["head.weight: elements 2 -> 3"]


def test_blocks_that_do_not_adjoin_are_listed():
    regions = [{"match": f"blocks.{i}", "lr_multiplier": 0.5} for i in (0, 2)]
    lines = plan_diff(plan(depth_strategy="flat"), plan(depth_strategy="flat", regions=regions))
    assert "blocks.000,002.ffn: lr 0.0003 -> 0.00015 (x0.5), 2 names" in lines


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A run folder, a plan file, two configs and a model."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text(plan().to_json())
    (tmp_path / "other.json").write_text(plan(component_lr={**RATES, "ffn": 6e-4}).to_json())
    (tmp_path / "same_config.json").write_text(json.dumps(config()))
    (tmp_path / "model.tsv").write_text(
        "".join(f"{n}\t{'x'.join(map(str, s))}\n" for n, s in names().items())
    )
    return tmp_path


def test_the_command_compares_runs_plans_and_configs_and_ends_with_1_where_they_differ(
    files: Path, capsys
):
    model = ["--model", str(files / "model.tsv")]
    assert main(["diff", str(files / "run"), str(files / "same_config.json"), *model]) == 0
    assert capsys.readouterr().out == ""
    assert main(["diff", str(files / "run"), str(files / "other.json")]) == 1
    assert (
        capsys.readouterr().out
        == "blocks.000-002.ffn: lr 9e-05..0.0003 -> 0.00018..0.0006 (x2), 3 names\n"
    )
    assert (
        main(
            ["diff", str(files / "other.json"), str(files / "same_config.json"), "--names", *model]
        )
        == 1
    )
    assert (
        capsys.readouterr().out.splitlines()[0]
        == "blocks.0.ff.net.2.weight: lr 0.0006 -> 0.0003 (x0.5)"
    )


def test_a_folder_of_checkpoints_stands_for_the_newest(files: Path, capsys):
    newest = files / "out" / "checkpoints" / "step_00000002"
    newest.mkdir(parents=True)
    (newest / "checkpoint.json").write_text("{}")
    (files / "other.json").rename(newest / "plan.json")
    for folder in (newest, newest.parent, files / "out"):
        assert main(["diff", str(files / "run"), str(folder)]) == 1
        assert "(x2), 3 names" in capsys.readouterr().out


def test_what_is_no_plan_is_one_line_with_status_2(files: Path, capsys):
    (files / "empty").mkdir()
    (files / "broken.json").write_text('{"digest": "x", "parameters": {"a": {"lr": 1}}}')
    row = (
        '{"lr": "1", "weight_decay": null, "numel": 1, "stack": "s", "block": null, "component":'
        ' "c"}'
    )
    (files / "text.json").write_text(f'{{"digest": "x", "parameters": {{"a": {row}}}}}')
    for other, part in (
        ("same_config.json", "pass --model MODEL"),
        ("empty", "neither plan.json nor a complete checkpoint"),
        ("broken.json", "rows are incomplete or no numbers"),
        ("nowhere", "nowhere"),
        ("text.json", "rows are incomplete or no numbers"),
    ):
        assert main(["diff", str(files / "run"), str(files / other)]) == 2
        line = capsys.readouterr().err
        assert part in line and line.count("\n") == 1
