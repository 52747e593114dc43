"""``steer.json``: what is asked for is in force from the next step on, on every rank, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr.checkpoint.manifest import read_manifest
from tests.support.jobs import as_lora, call_of, largest_difference, weights
from tests.support.ranks import run_ranks
from tests.support.steered import (
    BATCH,
    FLOOR,
    RATES,
    STEPS,
    WARMUP,
    asks,
    by_hand,
    component,
    start,
)

CLOSE = 1e-5
"""Of any weight, fp32."""
BAD = {20: '{"scale": [', 60: asks(scale=[{"component": "fnn", "by": 0.5}]), 150: asks(end=1)}
EVERY = 50
"""Steps between checkpoints."""
KEPT_KILL, TAKEN_KILL = 70, 130
"""The run is killed when a file is in force that no checkpoint has; and when one is taken up."""
GOOD: dict[int, str] = {
    10: asks(scale=[{"component": "self_attn", "by": 0.5}]),
    25: asks(scale=[{"component": "ffn", "by": 0.25}, {"match": "blocks.1", "by": 2.0}]),
    30: asks(freeze=[{"match": "patch_embedding"}]),
    40: asks(min_ratio=0.3),
    45: asks(save=True),
    55: asks(freeze=[{"component": "cross_attn", "match": "blocks.2"}], sample=True),
    65: asks(scale=[{"component": "norm", "by": 4.0}], min_ratio=0.2),
    KEPT_KILL: asks(scale=[{"component": "self_attn", "by": 4.0}]),
    80: asks(thaw=[{"match": "patch_embedding"}]),
    90: asks(scale=[{"match": "re:time_", "by": 0.125}]),
    101: asks(scale=[{"component": "default", "by": 2.0}]),
    110: asks(thaw=[{"match": "blocks.2.attn2"}], freeze=[{"component": "norm"}]),
    TAKEN_KILL: asks(scale=[{"component": "ffn", "by": 8.0}]),
    140: asks(reset=True, scale=[{"component": "ffn", "by": 0.5}]),
    160: asks(freeze=[{"match": "blocks.0"}], save=True),
    170: asks(thaw=[{"match": "blocks.0.ffn"}], min_ratio=0.4),
    180: asks(scale=[{"match": "proj_out", "by": 0.0625}]),
}
AGAIN_AT = 100
"""What was taken up before the kill is read again when the next start has loaded its checkpoint."""


def factor(name: str, step: int) -> float:
    """What the good changes make of a rate, by hand: one line for each."""
    kind, value = component(name), 1.0
    if step < 140:
        value *= 0.5 if step >= 10 and kind == "self_attn" else 1.0
        value *= 0.25 if step >= 25 and kind == "ffn" else 1.0
        value *= 2.0 if step >= 25 and name.startswith("blocks.1.") else 1.0
        value *= 4.0 if step >= 65 and kind == "norm" else 1.0
        value *= 4.0 if step >= KEPT_KILL and kind == "self_attn" else 1.0
        value *= 0.125 if step >= 90 and ".time_" in name else 1.0
        value *= 2.0 if step >= 101 and kind == "default" else 1.0
        value *= 8.0 if step >= AGAIN_AT and kind == "ffn" else 1.0
        held = 30 <= step < 80 and name.startswith("patch_embedding.")
        held |= 55 <= step < 110 and name.startswith("blocks.2.") and kind == "cross_attn"
        held |= step >= 110 and kind == "norm"
        return 0.0 if held else value
    value *= 0.5 if kind == "ffn" else 1.0
    value *= 0.0625 if step >= 180 and name.startswith("proj_out.") else 1.0
    first = step >= 160 and name.startswith("blocks.0.")
    return 0.0 if first and not (step >= 170 and ".ffn." in name) else value


def floor(step: int) -> float:
    if step < 40:
        return FLOOR
    if step < 65:
        return 0.3
    if step < 140:
        return 0.2
    return FLOOR if step < 170 else 0.4


def long_config(run_config: dict[str, Any]) -> dict[str, Any]:
    rates = {name: rate for name, rate in RATES.items() if name != "default"}
    block = {"enabled": True, "component_lr": rates, "depth_strategy": "flat"}
    return {
        **run_config,
        "learning_rate": RATES["default"],
        "per_layer_lr": block,
        "optimizer": {"type": "sgd", "momentum": 0.9, "weight_decay": 0.01},
        "schedule": {"type": "cosine", "warmup_steps": WARMUP, "min_ratio": FLOOR},
        "train": {"steps": STEPS, "global_batch": BATCH, "seed": 0, "grad_clip": 1.0}
        | {"save_every": EVERY, "log_every": 50, "keep": 2},
    }


def test_twenty_changes_and_two_kills_end_where_a_loop_with_those_rates_ends(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    config, changes = long_config(run_config), {**GOOD, **BAD}
    assert len(changes) == 20
    # Each start under another sharder: what was changed is in the plan that it begins with.
    starts = (
        ("ddp", ("kept", KEPT_KILL)),
        ("fsdp2", ("taken", TAKEN_KILL)),
        ("fsdp1_flat", None),
    )
    for sharding, kill in starts:
        call = call_of(config, tmp_path, "--sharding", sharding, "--resume", "latest")
        given = (call, changes, kill)
        if kill is None:
            ended = run_ranks(start, 2, *given)
        else:
            with pytest.raises(AssertionError, match="died with|closed by peer|reset by peer"):
                run_ranks(start, 2, *given)
    (status, said, complaint), _ = ended
    assert status == 0, complaint
    wanted = by_hand(tmp_path / "config.json", tmp_path, factor, floor)
    assert largest_difference(weights(tmp_path), wanted) < CLOSE
    # Each good file is there once, under the step since which it is in force.
    read = tmp_path / "out" / "steering"
    steps = sorted(AGAIN_AT if step == TAKEN_KILL else step for step in GOOD)
    assert sorted(p.name for p in read.glob("step_*")) == [f"step_{s:08d}.json" for s in steps]
    refused = sorted(p.name for p in read.glob("refused_*"))
    assert refused == [f"refused_{step:08d}.json" for step in sorted(BAD)]
    kept = read_manifest(tmp_path / "out" / "checkpoints" / "step_00000200").extra["steering"]
    assert [row["step"] for row in kept] == steps
    log = (tmp_path / "out" / "train.log").read_text()
    assert log.count("refused after step 20, training goes on unchanged: Invalid") == 1
    assert "Invalid steer.scale[0].component='fnn': must be one of" in log
    assert "Did you mean 'ffn'?" in log and "Invalid steer.end=1: must be true or false." in log
    assert "blocks.000-002.self_attn: lr 0.02 -> 0.01 (x0.5), 24 names" in log
    assert "blocks.000-002.self_attn: lr 0.01..0.02 -> 0.04..0.08 (x4), 24 names" in log
    # What the killed start had read after its last checkpoint is read again at the same step.
    again = "; it was read before, after the checkpoint that this start began from"
    for step in (55, 65, KEPT_KILL, 101, 110):
        assert f"steer.json after step {step} (steering/step_{step:08d}.json{again})" in log
    assert log.count(again) == 5
    assert log.count("saved checkpoint") >= 6 and "step_00000045 after 45 steps" in log
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["parameters"]["blocks.0.attn1.to_q.weight"]["lr"] == 0.0
    proof = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert proof["end"]["digest"] == plan["digest"] != proof["start"]["digest"]


def once(
    config: dict[str, Any], folder: Path, changes: dict[int, str], *flags: str
) -> tuple[str, Path]:
    """A start in one process. Returns what it said, and its output folder."""
    call = call_of(config, folder, *flags)
    ((status, said, complaint),) = run_ranks(start, 1, call, changes, None)
    assert status == 0, complaint
    return said, folder / "out"


def test_a_run_that_is_told_to_end_saves_all_and_a_later_start_goes_on(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    run_config["samples"] = {"count": 2, "steps": 2}
    run_config["validation"] = {"count": 2, "every": 3, "levels": [0.5]}
    asked = asks(end=True, scale=[{"component": "ffn", "by": 0.5}])
    changes = {2: asks(sample=True), 3: asked}
    said, out = once(run_config, tmp_path, changes, "--resume", "latest")
    assert "stopped by steer.json after 3 steps" in said
    assert "saved checkpoint" in said and "step_00000003 after 3 steps" in said
    # A reading that is due at the end is its last one.
    assert "step 3 of 5: validation loss" in said
    assert (out / "samples" / "step_000002.png").exists()
    assert not (out / "samples" / "samples.png").exists()
    plan = json.loads((out / "final" / "plan.json").read_text())
    # The rate that would have been in force from the next step on.
    assert plan["steered"] == [{"scale": [{"component": "ffn", "by": 0.5}]}]
    assert (
        json.loads((out / "final" / "verify.json").read_text())["end"]["digest"] == plan["digest"]
    )
    said, _ = once(run_config, tmp_path, {}, "--resume", "latest")
    assert "finished 5 steps" in said and "the plan differs" not in said
    assert json.loads((out / "plan.json").read_text())["digest"] == plan["digest"]


def test_a_run_that_is_killed_inside_a_ramp_ends_where_an_undisturbed_one_ends(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    rules = [
        {"components": ["norm"], "until": 5},
        {"match": "blocks", "ramp": 4, "unfreeze": {"every": 2, "start": "last"}},
    ]
    run_config["per_layer_lr"]["timing"] = rules
    run_config["train"] |= {"steps": 8, "save_every": 2}
    alone = call_of(run_config, tmp_path / "alone")
    ((status, _, complaint),) = run_ranks(start, 1, alone, {}, None)
    assert status == 0, complaint
    # After 3 steps the last block is inside its ramp, the one before has begun it; the newest
    # checkpoint has 2 steps. The order itself changes no rate.
    killed = tmp_path / "killed"
    for sharding, kill in (("fsdp2", ("kept", 3)), ("ddp", None)):
        call = call_of(run_config, killed, "--sharding", sharding, "--resume", "latest")
        given = (call, {3: asks(save=True)}, kill)
        if kill is not None:
            with pytest.raises(AssertionError, match="died with|closed by peer|reset by peer"):
                run_ranks(start, 2, *given)
            assert (killed / "out" / "checkpoints" / "step_00000002").is_dir()
        else:
            (status, _, complaint), _ = run_ranks(start, 2, *given)
            assert status == 0, complaint
    assert largest_difference(weights(killed), weights(tmp_path / "alone")) < CLOSE


def test_another_run_in_the_folder_is_not_steered_by_the_files_of_the_last(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    once(run_config, tmp_path, {2: asks(scale=[{"component": "ffn", "by": 0.5}])})
    (tmp_path / "out" / "steer.json").write_text(asks(end=True))
    said, out = once(run_config, tmp_path, {})
    assert "finished 5 steps" in said and "moved, not read" in said
    assert [path.name for path in (out / "steering").iterdir()] == ["unread.json"]
    assert "steered" not in json.loads((out / "plan.json").read_text())


def test_streamed_blocks_are_steered_where_a_group_has_to_part(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    config = as_lora(run_config)
    config["memory"] = {"stagehand": {"enabled": True, "min_numel": 1}}
    said, out = once(
        config, tmp_path, {2: asks(scale=[{"match": "blocks.1.attn1.to_q", "by": 0.5}])}
    )
    assert "blocks.001.self_attn: lr" in said and "finished 5 steps" in said
    plan = json.loads((out / "plan.json").read_text())["parameters"]
    # Names of adapters have a prefix, without which the pattern found them.
    (query,), (key,) = (
        [row["lr"] for name, row in plan.items() if f"blocks.1.attn1.{part}.lora_A" in name]
        for part in ("to_q", "to_k")
    )
    assert query == 0.5 * key


def test_a_floor_is_refused_where_the_schedule_has_none(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    run_config["schedule"] = {"type": "constant"}
    said, out = once(run_config, tmp_path, {1: asks(min_ratio=0.5), 3: "{}"})
    assert "refused after step 1, training goes on unchanged: Invalid steer.min_ratio=0.5" in said
    assert "Invalid steer: it asks for nothing. Give one of reset, thaw" in said
    assert "steered" not in json.loads((out / "plan.json").read_text())
