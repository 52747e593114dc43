"""``dist-layerlr advise``: planted runs are found, balanced ones left alone, few rows say so."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr.cli import main
from dist_layerlr.plan import build_plan, load_config, steered
from dist_layerlr.plan.entries import Plan, cell_name
from dist_layerlr.report.advise import _compared, compare
from dist_layerlr.report.proposal import UNPROVEN
from tests.support.plans import config, toy

BLOCKS, WEIGHT, RATIO, GRADIENT = 6, 10.0, 1e-3, 0.1
EQUAL = dict.fromkeys(("self_attn", "cross_attn", "ffn", "norm"), 1e-4)
Cell = tuple[str | None, int | None, str]


def plan_of(**block: Any) -> tuple[dict[str, Any], Plan]:
    given = config(component_lr=EQUAL, depth_strategy="flat", **block)
    raw = {**given, "learning_rate": 1e-4}
    return raw, build_plan(toy(BLOCKS), raw)


def row(
    plan: Plan, step: int, moved: Mapping[Cell, float], felt: Mapping[Cell, float], noise: float
) -> dict[str, Any]:
    """A row of metrics.jsonl; what the plan trains at more moves more, and all of it is noisy."""
    drawn, factor = random.Random(step), 1.0 / (1 + step)
    cells: dict[str, list[float]] = {}
    for entry in plan.entries.values():
        scale = factor * drawn.lognormvariate(0, noise)
        # The scales of a norm are 1: the same rate moves them less far.
        scale *= 0.02 if entry.component == "norm" else 1.0
        ratio = RATIO * scale * moved.get(entry.cell, 1.0)
        gradient = GRADIENT * drawn.lognormvariate(0, noise) * felt.get(entry.cell, 1.0)
        cells[cell_name(entry.cell)] = [entry.lr * factor, gradient, WEIGHT, ratio]
    return {"step": step, "loss": 1.0, "lr_factor": factor, "cells": cells}


def write(
    folder: Path,
    raw: dict[str, Any],
    plan: Plan,
    *,
    rows: int = 30,
    moved: Mapping[Cell, float] | None = None,
    felt: Mapping[Cell, float] | None = None,
    noise: float = 0.2,
) -> str:
    """A run's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(plan.to_json())
    (folder / "resolved_config.json").write_text(json.dumps(raw))
    written = [row(plan, 4 * n, moved or {}, felt or {}, noise) for n in range(rows)]
    lines = [{"step": 1, "loss": 1.0}, *written]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


def cells_where(plan: Plan, component: str, value: float, *blocks: int) -> dict[Cell, float]:
    """The value for a component, in all blocks or in some."""
    found: dict[Cell, float] = {}
    for entry in plan.entries.values():
        if entry.component == component and (not blocks or entry.block in blocks):
            found[entry.cell] = value
    return found


def advice(folder: str, status: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["advise", folder, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_component_that_moves_ten_times_more_is_named_and_slowed(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of()
    folder = write(tmp_path, raw, plan, moved=cells_where(plan, "self_attn", 10.0))
    found = advice(folder, 1, capsys)
    far = [pool["component"] for pool in found["pools"] if pool["verdict"] == "far more"]
    assert far == ["self_attn"] * 3
    for pool in found["pools"]:
        wanted = 10.0 if pool["component"] == "self_attn" else 1.0
        assert pool["moves"]["low"] <= wanted <= pool["moves"]["high"] * 1.2
        assert pool["moves"]["times"] == pytest.approx(wanted, rel=0.3)
    # By a factor of 4 at most, whatever is asked for.
    assert found["steer"] == {"scale": [{"component": "self_attn", "by": 0.25}]}
    block = load_config(found["config"]).per_layer_lr
    assert block.component_lr == {**EQUAL, "self_attn": 2.5e-5}
    proposed = build_plan(toy(BLOCKS), found["config"])
    assert proposed.digest == steered(plan, found["steer"]).digest != plan.digest
    assert found["rows"] == {"measured": 30, "used": 27} and found["steps"][0] == 12
    assert main(["advise", folder]) == 1
    text = capsys.readouterr().out
    assert "27 of 30 measured rows, steps 12 to 116" in text
    assert "self_attn, first third: rate x 0.25" in text and UNPROVEN in text


def test_a_part_of_the_depth_is_a_region_of_its_own(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of()
    folder = write(tmp_path, raw, plan, moved=cells_where(plan, "ffn", 10.0, 0, 1))
    found = advice(folder, 1, capsys)
    (region,) = found["config"]["per_layer_lr"]["regions"]
    assert region["component_lr"] == {**EQUAL, "ffn": 2.5e-5}
    proposed, now = build_plan(toy(BLOCKS), found["config"]), steered(plan, found["steer"])
    changed = {e.cell for e in proposed.entries.values() if e.lr != plan.entries[e.name].lr}
    assert changed == {("blocks", 0, "ffn"), ("blocks", 1, "ffn")}
    assert proposed.digest == now.digest


def test_what_lies_outside_blocks_is_told_from_the_same_component_inside(
    tmp_path: Path, capsys
) -> None:
    raw, _ = plan_of()
    names = {**toy(BLOCKS), **{f"blocks.{i}.gate": (8,) for i in range(BLOCKS)}}
    plan = build_plan(names, raw)
    inside = cells_where(plan, "default", 10.0, *range(BLOCKS))
    everywhere = cells_where(plan, "default", 10.0)
    moved = {cell: everywhere[cell] for cell in everywhere.keys() - inside.keys()}
    found = advice(write(tmp_path, raw, plan, moved=moved), 1, capsys)
    now, proposed = steered(plan, found["steer"]), build_plan(names, found["config"])
    changed = [name for name, entry in plan.entries.items() if now.entries[name].lr != entry.lr]
    assert sorted(changed) == ["proj_out.weight", "x_embedder.weight"]
    assert proposed.digest == now.digest


def test_a_part_that_moves_far_less_is_raised_only_where_gradients_arrive(
    tmp_path: Path, capsys
) -> None:
    raw, plan = plan_of()
    less, none = cells_where(plan, "ffn", 0.1), cells_where(plan, "ffn", 0.05)
    found = advice(write(tmp_path / "held", raw, plan, moved=less), 1, capsys)
    assert found["steer"] == {"scale": [{"component": "ffn", "by": 4.0}]}
    folder = write(tmp_path / "starved", raw, plan, moved=less, felt=none)
    starved = advice(folder, 0, capsys)
    assert {p["verdict"] for p in starved["pools"] if p["component"] == "ffn"} == {"far less"}
    assert starved["steer"] is None
    assert main(["advise", folder]) == 0
    assert "its gradients are as small or smaller" in capsys.readouterr().out


def test_a_balanced_run_has_nothing_to_change(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of()
    found = advice(write(tmp_path, raw, plan, noise=0.5), 0, capsys)
    assert {pool["verdict"] for pool in found["pools"]} == {"alike"}
    assert (found["steer"], found["config"]) == (None, None)
    assert main(["advise", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "nothing to change: no part surely moves 3 times more or less" in text
    assert UNPROVEN in text


def test_a_part_that_is_far_off_in_noise_alone_is_unsure(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of()
    moved = cells_where(plan, "self_attn", 4.0)
    found = advice(write(tmp_path, raw, plan, moved=moved, noise=0.3, rows=12), 0, capsys)
    verdicts = {p["verdict"] for p in found["pools"] if p["component"] == "self_attn"}
    assert verdicts & {"unsure"} and not verdicts & {"far more"}


def test_too_few_rows_say_so_plainly(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of()
    moved = cells_where(plan, "self_attn", 10.0)
    folder = write(tmp_path, raw, plan, moved=moved, rows=7)
    assert advice(folder, 4, capsys)["steer"] is None
    assert main(["advise", folder]) == 4
    assert "not enough rows: 7, and 8 are needed to say anything." in capsys.readouterr().out


def test_only_rows_since_the_last_change_of_rates_count() -> None:
    raw, plan = plan_of()
    now = steered(plan, {"scale": [{"component": "self_attn", "by": 0.1}]})
    loud = cells_where(plan, "self_attn", 10.0)
    rows = [row(plan, n, loud, {}, 0.1) for n in range(20)]
    rows += [row(now, n, {}, {}, 0.1) for n in range(20, 32)]
    found = compare(rows, now.to_dict()["parameters"])
    assert (found.steps[0], len(found.steps)) == (20, 12)
    assert {pool.verdict for pool in found.pools} == {"alike"}
    assert found.why_fewer.startswith("rates were changed on the way")


def test_what_is_held_still_is_not_compared(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of()
    still = steered(plan, {"freeze": [{"component": "ffn"}]})
    folder = write(tmp_path, raw, still, moved=cells_where(plan, "ffn", 0.0))
    found = advice(folder, 0, capsys)
    assert "ffn" not in {pool["component"] for pool in found["pools"]}
    assert [text for text in found["left_out"] if text.startswith("ffn, first third: held still")]


def test_a_config_with_regions_gets_its_advice_as_steer_json_alone(tmp_path: Path, capsys) -> None:
    raw, plan = plan_of(regions=[{"match": "proj_out", "lr": 1e-4}])
    folder = write(tmp_path, raw, plan, moved=cells_where(plan, "self_attn", 10.0))
    found = advice(folder, 1, capsys)
    assert found["config"] is None and "the config has regions" in found["note"]
    assert found["steer"] == {"scale": [{"component": "self_attn", "by": 0.25}]}


@pytest.mark.parametrize(
    ("edit", "words", "says"),
    [
        ("none", [], "holds no metrics.jsonl with rows of steps: give the folder of a run."),
        ("no cells", [], "Train with --set per_layer_lr.log_grad_norms=true (every"),
        ("off", [], "has one cell for all parameters: per_layer_lr was off."),
        ("experts", [], "trains transformer, transformer_2: name one with --network."),
        ("experts", ["--network", "other"], "trains transformer, transformer_2: name one with"),
    ],
)
def test_a_run_that_says_nothing_is_refused_with_what_to_set(
    edit: str, words: list[str], says: str, tmp_path: Path, capsys
) -> None:
    raw, plan = plan_of()
    if edit == "off":
        raw = {"learning_rate": 1e-4}
        plan = build_plan(toy(BLOCKS), raw)
    folder = Path(write(tmp_path, raw, plan))
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    if edit == "none":
        lines = []
    elif edit == "no cells":
        lines = [{"step": line["step"], "loss": line["loss"]} for line in lines]
    elif edit == "experts":
        networks = ("transformer", "transformer_2")
        lines = [{**line, "network": networks[n % 2]} for n, line in enumerate(lines)]
    metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["advise", str(folder), *words]) == 2
    assert says in capsys.readouterr().err


def test_rows_that_resemble_their_neighbours_count_as_fewer() -> None:
    values = [math.exp(n / 20) for n in range(-20, 21)]
    slow = _compared([(value, 1.0) for value in values])
    random.Random(0).shuffle(values)
    quick = _compared([(value, 1.0) for value in values])
    assert slow is not None and quick is not None
    assert slow.times == quick.times == 1.0
    assert math.log(slow.high) > 3 * math.log(quick.high) > 0
