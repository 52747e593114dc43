"""Shared fixtures: a small real Wan checkpoint on disk and a config that trains it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers-format Wan checkpoint: 3 blocks of width 32."""
    folder = tmp_path_factory.mktemp("checkpoint") / "wan"
    from launch import make_tiny_wan  # imports diffusers, which most tests do without

    small = ["--layers", "3", "--heads", "2", "--head-dim", "16", "--freq-dim", "32"]
    assert make_tiny_wan.main([str(folder), *small]) == 0
    return folder


@pytest.fixture
def run_config(tiny_wan: Path) -> dict[str, Any]:
    """A full finetune of the tiny checkpoint: 5 steps, global batch 8."""
    return {
        "model_type": "wan",
        "model_path": str(tiny_wan),
        "training_method": "fine_tune",
        "learning_rate": 3e-4,
        "per_layer_lr": {
            "enabled": True,
            "component_lr": {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 1e-4},
            "depth_strategy": "cosine",
            "min_depth_factor": 0.5,
            "no_decay": ["ndim<=1"],
        },
        "data": {"kind": "digits"},
        "optimizer": {"type": "adamw", "weight_decay": 0.01},
        "schedule": {"type": "cosine", "warmup_steps": 1, "min_ratio": 0.1},
        "train": {"steps": 5, "global_batch": 8, "seed": 0, "grad_clip": 1.0},
        "samples": {"count": 0},
    }


@pytest.fixture
def write_config(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Write a config as a JSON file and return its path."""

    def write(config: dict[str, Any], name: str = "config.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(config))
        return path

    return write
