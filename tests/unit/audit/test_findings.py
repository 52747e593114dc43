"""The judgement of an audit: what groups were given against what is in force, and rows of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_layerlr.audit.changes import Schedules, group_problems
from dist_layerlr.audit.findings import FAULTS, find
from dist_layerlr.audit.merge import read_reports
from dist_layerlr.plan import build_plan


def groups(*rates: float, **more: Any) -> list[dict[str, Any]]:
    return [{"lr": rate, "params": 1.0, **more} for rate in rates]


def scaled(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"lr": lr, "lr_scale": scale, "params": 1.0} for lr, scale in pairs]


@pytest.mark.parametrize(
    ("given", "live", "kind"),
    [
        (groups(1e-3, 1e-4), groups(5e-4, 5e-5), None),
        (groups(1e-3, 1e-4), groups(1e-3, 1e-3), "flattened"),
        # A floor raises the slow group: cosine to eta_min.
        (groups(1e-3, 1e-4), groups(5e-4, 1e-4), "changed"),
        (groups(1e-3, 0.0), groups(5e-4, 0.0), None),
        (groups(1e-3, 0.0), groups(5e-4, 5e-4), "flattened"),
        (groups(1e-3, 1e-4), groups(1e-4), "flattened"),
        (groups(1e-3), groups(1e-3), None),
        # DeepSpeed leaves out empty groups.
        ([*groups(1e-3, 1e-4), {"lr": 1.0, "params": 0.0}], groups(1e-3, 1e-4), None),
        (scaled((1.0, 1.0), (1.0, 0.5)), groups(2.0, 1.0), None),
        (scaled((1.0, 1.0), (1.0, 0.5)), groups(2.0, 2.0), "unread"),
        # Scaled in lr already, and again by a schedule that reads lr_scale.
        (scaled((1.0, 1.0), (0.5, 0.5)), groups(1.0, 0.1), "changed"),
    ],
)
def test_ratios_between_groups_are_those_that_were_given(given: Any, live: Any, kind: Any):
    found = group_problems("AdamW", given, live)
    assert [one[0] for one in found] == ([] if kind is None else [kind])


def test_a_schedule_that_was_resumed_is_ahead_of_nothing():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=1000)
    schedule.last_epoch = 500
    watch = Schedules()
    for done in range(3):
        assert watch.problems([optimizer], done) == []
        schedule.last_epoch += 1
    schedule.last_epoch += 3
    ((kind, text),) = watch.problems([optimizer], 3)
    assert (kind, text) == ("schedule", "LinearLR advances 2 times per optimizer step")


ROW = {
    "optimizers": [0],
    "moved": True,
    "twice": False,
    "algorithm": "AdamW",
    "group": 0,
    "lr": 1e-3,
    "initial_lr": 1e-3,
    "weight_decay": 0.0,
    "elements": 4,
    "replicas": 1,
    "factor": 1.0,
    "gradient": True,
    "master": "float32",
    "state": {},
}


def report(folder: Path, rank: int, rows: dict[str, Any], trainable: tuple[str, ...] = ("w",)):
    shapes = {n: {"shape": [8], "trainable": True, "class": "Linear"} for n in trainable}
    content = {
        "rank": rank,
        "ranks": 2,
        "models": {"Net": {"sharder": "fsdp2", "parameters": shapes}},
        "names": {"Net": {name: {**ROW, **row} for name, row in rows.items()}},
        "problems": [],
    }
    (folder / f"rank{rank}.1.json").write_text(json.dumps(content))


def kinds(folder: Path) -> list[str]:
    seen = read_reports(folder)
    assert seen is not None
    return [finding.kind for finding in find(seen)]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({}, {}, []),
        ({}, {"elements": 3}, ["incomplete"]),
        # Both ranks hold all of it.
        ({"elements": 8, "replicas": 2}, {"elements": 8, "replicas": 2}, []),
        ({"elements": 8}, {"elements": 8}, ["incomplete"]),
        ({}, {"lr": 2e-3}, ["ranks"]),
        # Where a rank holds nothing, nothing moves.
        ({"elements": 8}, {"elements": 0, "moved": False, "gradient": None}, []),
        ({"moved": False}, {"moved": False}, ["unmoved"]),
        ({"moved": False, "gradient": None}, {"moved": False, "gradient": None}, ["no gradient"]),
        ({"moved": False, "lr": 0.0}, {"moved": False, "lr": 0.0}, []),
        ({"obeys": False}, {}, ["effect"]),
        ({"twice": True, "elements": 8}, {"twice": True, "elements": 8}, ["twice"]),
        ({"weight_decay": 0.1}, {"weight_decay": 0.1}, ["decay"]),
        ({"state": {"exp_avg": "bfloat16"}}, {}, ["precision"]),
    ],
)
def test_ranks_are_judged_together(first: Any, second: Any, expected: Any, tmp_path: Path):
    report(tmp_path, 0, {"w": first})
    report(tmp_path, 1, {"w": second})
    assert kinds(tmp_path) == expected


def test_faults_stand_before_warnings(tmp_path: Path):
    for rank in (0, 1):
        report(tmp_path, rank, {"w": {"weight_decay": 0.1}}, trainable=("w", "v"))
    assert kinds(tmp_path) == ["dead", "decay"]
    assert "dead" in FAULTS and "decay" not in FAULTS


def test_names_that_only_a_base_model_tells_are_judged_by_their_shapes(tmp_path: Path):
    for rank in (0, 1):
        name = "lora_unet_blocks_0_attn_to_q.lora_down.weight"
        report(tmp_path, rank, {name: {"weight_decay": 0.1}}, trainable=(name,))
    assert kinds(tmp_path) == ["decay"]


def test_a_name_that_only_one_side_trains_is_told_with_its_side(tmp_path: Path):
    report(tmp_path, 0, {"w": {}})
    seen = read_reports(tmp_path)
    assert seen is not None
    planned = build_plan({"v": (8,)}, {"learning_rate": 1e-3}).to_dict()["parameters"]
    told = sorted(one.text for one in find(seen, planned) if one.kind == "plan")
    assert [text.partition(", lr")[0].partition("only in ")[2] for text in told] == [
        "the plan",
        "the script",
    ]
