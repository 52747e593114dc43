"""A run of Wan 2.2's two experts: a tiny pipeline, its config, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from launch.trainer.team import Turns
from tests.support.jobs import Ended, run_in_ranks
from tests.support.oracle import noise

HIGH, LOW = "transformer", "transformer_2"
BOUNDARY, SHIFT = 0.875, 12.0
ABOVE = 1 - NormalDist().cdf(-0.53900)
"""Of a logit-normal share bent by 12 that 0.875 is exceeded: 0.875 comes from 7/19, whose logit is
ln(7/12)."""
STEPS = 6
TURNS = Turns(shares={HIGH: ABOVE, LOW: 1 - ABOVE})


def make_pipeline(folder: Path) -> Path:
    """A tiny pipeline of two experts, and a cache of four samples beside it."""
    from launch.trainer.tiny import build

    build("wan22").save_pretrained(folder / "pipeline")
    (folder / "cache").mkdir()
    for number in range(4):
        prompt = noise(50 + number, 6, 16)
        sample = {"latents": noise(number, 4, 3, 2, 4), "prompt_embeds": prompt}
        save_file(sample, folder / "cache" / f"{number}.safetensors")
    return folder / "pipeline"


def config_of(pipeline: Path, **objective: Any) -> dict[str, Any]:
    return {
        "model_type": "wan22",
        "model_path": str(pipeline),
        "training_method": "fine_tune",
        "learning_rate": 1e-3,
        "per_layer_lr": {"enabled": True, "component_lr": {"self_attn": 2e-3}},
        "data": {"kind": "cached", "folder": str(pipeline.with_name("cache"))},
        "objective": objective,
        "schedule": {"type": "linear", "warmup_steps": 2},
        "train": {"steps": STEPS, "global_batch": 2, "save_every": 3},
        "samples": {"count": 0},
    }


def trained(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "out/final" / name / "diffusion_pytorch_model.safetensors")


def published(pipeline: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(pipeline / name / "diffusion_pytorch_model.safetensors")


def succeed(ranks: int, *calls: list[str]) -> list[Ended]:
    ended = run_in_ranks(ranks, list(calls))
    assert [one.status for one in ended] == [0] * len(calls), [one.complaint for one in ended]
    return ended


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
