"""Runs over samples of two sizes, some without their caption: the same on any number of ranks."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launch.trainer.data.cached import EMPTY_PROMPT
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import Diffusion
from launch.trainer.tiny import build
from tests.support.jobs import Ended, call_of, largest_difference, run_in_ranks, weights
from tests.support.pixels import clip_of

CAPTIONS = ("a red cat", "dogs", "a road", "cat", "two mats", "x", "three cats")
SIZES = ((32, 64), (64, 32), (32, 64), (32, 64), (64, 32), (32, 64), (64, 32))
"""4 of one size and 3 of another: with a batch of 2 two batches of each, and one sample twice."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    root: Path
    ended: dict[str, Ended]

    def trained(self, label: str) -> dict[str, torch.Tensor]:
        assert self.ended[label].status == 0, self.ended[label].complaint
        return weights(self.root / label)


def write_cache(root: Path) -> None:
    pipeline, family = build("pixart"), get_family("pixart")
    assert isinstance(family, Diffusion)
    pipeline.save_pretrained(root / "model")
    (root / "cache").mkdir()
    with torch.no_grad():
        for i, (caption, size) in enumerate(zip(CAPTIONS, SIZES, strict=True)):
            encoded = family.encode_pixels(pipeline, clip_of(i, 1, *size))
            sample = {**encoded, **family.encode_prompt(pipeline, caption)}
            save_file(sample, root / "cache" / f"{i}.safetensors", metadata={"caption": caption})
        save_file(dict(family.encode_prompt(pipeline, "")), root / "cache" / EMPTY_PROMPT)


def config_of(root: Path, **train: Any) -> dict[str, Any]:
    return {
        "model_type": "pixart",
        "model_path": str(root / "model"),
        "adapter": {"type": "lora", "rank": 4, "alpha": 8},
        "per_layer_lr": {"enabled": True, "component_lr": {"self_attn": 0.4, "cross_attn": 0.2}},
        "learning_rate": 0.1,
        # AdamW would make a full step of a gradient that is nothing but rounding.
        "optimizer": {"type": "sgd"},
        "data": {"kind": "cached", "folder": str(root / "cache")},
        "samples": {"count": 0},
        "train": {"steps": 6, "global_batch": 2, "caption_dropout": 0.5, **train},
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("buckets")
    write_cache(root)
    whole = config_of(root, save_every=3)
    no_empty = copy.deepcopy(whole)
    no_empty["data"]["folder"] = str(root / "bare")
    (root / "bare").mkdir()
    for file in (root / "cache").glob("[0-9]*"):
        (root / "bare" / file.name).write_bytes(file.read_bytes())
    ended: dict[str, Ended] = {}

    def do(ranks: int, **calls: tuple[dict[str, Any], list[str]]) -> None:
        named = {label: call_of(c, root / label, *flags) for label, (c, flags) in calls.items()}
        ended.update(zip(named, run_in_ranks(ranks, list(named.values())), strict=True))

    alone = ["--sharding", "none"]
    do(
        1,
        alone=(whole, alone),
        kept=(config_of(root, caption_dropout=0.0), alone),
        refused=(no_empty, alone),
    )
    # Three steps of 2 were done: steps of 3 do not begin at a border of the epoch's batches.
    (middle,) = (root / "alone" / "out" / "checkpoints").glob("step_*3")
    begun = [*alone, "--resume", str(middle)]
    do(1, again=(whole, begun), wider=(config_of(root, global_batch=3), begun))
    do(2, two=(whole, ["--sharding", "ddp"]))
    return Runs(root=root, ended=ended)


def test_two_ranks_train_on_the_same_batches(runs: Runs):
    assert largest_difference(runs.trained("alone"), runs.trained("two")) <= 1e-5
    assert largest_difference(runs.trained("alone"), runs.trained("kept")) > 1e-4


def test_the_buckets_are_said(runs: Runs):
    said = "7 samples in 2 buckets (1 seen again an epoch to fill batches), global batch 2"
    assert said in runs.ended["alone"].said


def test_a_resumed_run_goes_on_with_the_same_batches(runs: Runs):
    assert largest_difference(runs.trained("alone"), runs.trained("again")) <= 1e-6


def test_a_resumed_run_may_have_another_size_of_batch(runs: Runs):
    assert runs.ended["wider"].status == 0, runs.ended["wider"].complaint
    rows = [json.loads(line) for line in (runs.root / "wider" / "out" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == [3, 4, 5]


def test_caption_dropout_without_an_empty_prompt_is_refused_before_training(runs: Runs):
    ended = runs.ended["refused"]
    assert ended.status == 2 and ended.complaint.count("\n") == 1
    assert "Invalid train.caption_dropout: the data set holds no empty prompt" in ended.complaint
