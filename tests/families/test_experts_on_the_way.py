"""What a run of both experts of Wan 2.2 does on its way: averages, readings, changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_layerlr.export.saved import SavedWeights
from tests.support.experts import (
    HIGH,
    LOW,
    STEPS,
    TURNS,
    config_of,
    make_pipeline,
    published,
    rows,
    succeed,
    trained,
)
from tests.support.jobs import call_of, largest_difference
from tests.support.ranks import run_ranks
from tests.support.steered import asks, start


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("wan22"))


def test_each_expert_has_its_average_and_its_reading_in_its_own_range(
    pipeline: Path, tmp_path: Path
) -> None:
    config = config_of(pipeline)
    # Half of what is trained, after every step of the expert at hand.
    config["ema"] = {"decay": 0.5, "warmup": False}
    config["train"] |= {"save_every": 1, "early_stop": {"patience": 99}}
    config["validation"] = {"count": 1, "every": 3, "levels": [0.5]}
    succeed(1, call_of(config, tmp_path / "one"))
    succeed(2, call_of(config, tmp_path / "two", "--sharding", "fsdp2"))
    one, two = (
        [row for row in rows(tmp_path / ranks) if "val_loss" in row] for ranks in ("one", "two")
    )
    assert [(row["step"], row["network"]) for row in one] == [
        (2, HIGH),
        (2, LOW),
        (5, HIGH),
        (5, LOW),
    ]
    for mine, right in zip(two, one, strict=True):
        assert mine["val_loss/0.5"] == pytest.approx(right["val_loss/0.5"], rel=1e-4)
    for name in (HIGH, LOW):
        found = published(pipeline, name)
        for step in range(1, STEPS + 1):
            if TURNS.at(step - 1) == name:
                saved = SavedWeights(tmp_path / f"one/out/{name}/checkpoints/step_{step:08d}")
                found = {key: (found[key] + saved.fetch(key)) / 2 for key in found}
        for ranks in ("one", "two"):
            assert largest_difference(trained(tmp_path / ranks, name), found) <= 1e-5


def test_a_change_on_the_way_is_in_force_for_both_experts_and_after_a_resume(
    pipeline: Path, tmp_path: Path
) -> None:
    changes = {2: asks(scale=[{"component": "self_attn", "by": 0.25}]), 4: asks(min_ratio=0.5)}
    told = []
    for folder, *flags in (("whole",), ("cut", "--max-steps", "3"), ("cut",)):
        call = call_of(config_of(pipeline), tmp_path / folder, "--resume", "latest", *flags)
        ((status, said, complaint),) = run_ranks(start, 1, call, changes, None)
        assert status == 0, complaint
        told.append((said.count("self_attn: lr 0.00"), said.count("schedule.min_ratio: 0.5")))
    # Of each expert; the last start begins with it.
    assert told == [(2, 1), (2, 0), (0, 1)]
    for name in (HIGH, LOW):
        gap = largest_difference(trained(tmp_path / "whole", name), trained(tmp_path / "cut", name))
        assert gap == 0
        plan = json.loads((tmp_path / "cut/out" / name / "plan.json").read_text())
        assert len(plan["steered"]) == 1
