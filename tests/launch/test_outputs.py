"""What runs leave in their output folder: never a mix of two, never NaN, never half of it for want
of a place."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_layerlr.errors import ConfigError
from launch import train
from launch.trainer.metrics import MetricsFile
from launch.trainer.outputs import _check_finite, open_output_dir
from launch.trainer.runtime import Diverged
from tests.support.ranks import run_ranks


def train_one_after_another(
    rank: int, world_size: int, calls: list[list[str]]
) -> list[tuple[int, str]]:
    """Exit status and standard error of each call."""
    results = []
    for call in calls:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            results.append((train.main(call), said.getvalue()))
    return results


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def call(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> list[str]:
    run_config["train"]["steps"] = 2
    return ["--config", str(write_config(run_config)), "--output-dir", str(tmp_path / "out")]


def test_a_second_run_into_the_same_folder_replaces_the_first(
    call: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    pictured = [
        *call,
        "--set",
        "samples.count=1",
        "--set",
        "samples.steps=1",
        "--set",
        "train.dtype=bf16",
    ]
    lora = [*call, "--set", "training_method=lora"]
    ((first, said), (second, _)) = run_ranks(train_one_after_another, 1, [pictured, lora])[0]
    assert (first, second) == (0, 0)
    assert "Warning" not in said
    assert files(tmp_path / "out") == {
        ".lock",
        "notes.txt",
        "plan.json",
        "verify.json",
        "metrics.jsonl",
        "lr_grid.png",
        "final/adapter_config.json",
        "final/adapter_model.safetensors",
    }


def test_a_run_that_diverges_ends_with_status_1_and_saves_nothing(
    call: list[str], tmp_path: Path
) -> None:
    flat = [*call, "--set", "per_layer_lr.enabled=false"]
    ((status, said),) = run_ranks(
        train_one_after_another, 1, [[*flat, "--set", "learning_rate=1e30"]]
    )[0]
    assert status == 1
    assert (
        "train.py: error: loss is nan at step 1; nothing is saved. Lower the learning rates" in said
    )
    last = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["loss"] is None and "NaN" not in last
    assert "final/diffusion_pytorch_model.safetensors" not in files(tmp_path / "out")


def test_weights_that_the_last_step_broke_are_not_saved() -> None:
    model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2), "proj": torch.nn.Linear(1, 2)})
    torch.nn.init.constant_(model["proj"].weight, float("inf"))
    with pytest.raises(
        Diverged, match="proj.weight holds NaN or infinity after 9 steps; nothing is saved"
    ):
        _check_finite(model, 9)


def test_metrics_are_json_even_where_a_number_is_not(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m.jsonl").write(
        {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "x": 0.5}
    )
    assert (
        tmp_path / "m.jsonl"
    ).read_text() == '{"step": 1, "loss": null, "grad_norm": null, "x": 0.5}\n'


@pytest.mark.parametrize(
    ("taken", "is_folder"),
    [("plan.json", True), ("final/config.json", True), ("final", False), ("samples", False)],
)
def test_a_folder_that_cannot_take_every_file_is_refused_before_training(
    taken: str, is_folder: bool, tmp_path: Path
) -> None:
    if is_folder:
        (tmp_path / taken).mkdir(parents=True)
    else:
        (tmp_path / taken).write_text("")
    with pytest.raises(ConfigError, match=rf"Cannot write to --output-dir .*{taken}"):
        open_output_dir(tmp_path, "model", probe=True)
    open_output_dir(tmp_path, "model", probe=False)


def test_a_run_does_not_replace_the_model_it_starts_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model_path is its final/"):
        open_output_dir(tmp_path, str(tmp_path / "x" / ".." / "final"), probe=False)


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another run is writing to it"):
            open_output_dir(tmp_path, "model", probe=True)
    open_output_dir(tmp_path, "model", probe=True)
