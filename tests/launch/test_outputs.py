"""What runs leave in their output folder: never a mix of two, never NaN, never half of it for want
of a place."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from dist_layerlr.errors import ConfigError
from launch import train
from launch.trainer import lock
from launch.trainer.metrics import MetricsFile
from launch.trainer.outputs import _check_finite, open_output_dir
from launch.trainer.runtime import Diverged
from launch.trainer.samples import draw_samples
from tests.support.ranks import run_ranks


def train_one_after_another(
    rank: int, world_size: int, calls: list[list[str]], keep: Path | None = None
) -> list[tuple[int, str]]:
    """Exit status and standard error of each call. After the first one, folder ``keep`` is copied
    to ``kept`` beside the output folder."""
    results = []
    for call in calls:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            results.append((train.main(call), said.getvalue()))
        if keep is not None and call is calls[0]:
            shutil.copytree(keep, keep.parent.parent / "kept")
    return results


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


@pytest.fixture
def call(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> list[str]:
    run_config["train"]["steps"] = 2
    return ["--config", str(write_config(run_config)), "--output-dir", str(tmp_path / "out")]


def test_a_second_run_into_the_same_folder_replaces_the_first(
    call: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out" / "final").mkdir(parents=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "final" / "README.md").write_text("mine too")
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
        ".lock.holder",
        "notes.txt",
        "plan.json",
        "verify.json",
        "metrics.jsonl",
        "lr_grid.png",
        "page.html",
        "run.json",
        "resolved_config.json",
        "train.log",
        "final/plan.json",
        "final/verify.json",
        "final/adapter_config.json",
        "final/adapter_model.safetensors",
        "final/pytorch_lora_weights.safetensors",
        "final/README.md",
    }
    assert (tmp_path / "out" / "final" / "README.md").read_text() == "mine too"


def test_a_run_that_diverges_ends_with_status_1_and_leaves_the_earlier_result_as_it_was(
    call: list[str], tmp_path: Path
) -> None:
    flat = [*call, "--set", "per_layer_lr.enabled=false"]
    out = tmp_path / "out"
    ((first, _), (status, said)) = run_ranks(
        train_one_after_another,
        1,
        [[*flat, "--max-steps", "1"], [*flat, "--set", "learning_rate=1e30"]],
        out / "final",
    )[0]
    assert (first, status) == (0, 1)
    assert (
        "train.py: error: loss is nan at step 1; nothing is saved. Lower the learning rates" in said
    )
    last = (out / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["loss"] is None and "NaN" not in last
    assert "error: loss is nan at step 1" in (out / "train.log").read_text().splitlines()[-1]
    assert contents(out / "final") == contents(tmp_path / "kept")
    assert {name.split("/")[0] for name in files(out)} == {
        ".lock",
        ".lock.holder",
        "plan.json",
        "metrics.jsonl",
        "lr_grid.png",
        "run.json",
        "resolved_config.json",
        "train.log",
        "final",
    }


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


def test_a_folder_that_another_run_holds_is_waited_for_and_then_refused(tmp_path: Path) -> None:
    said: list[str] = []
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="writing to it, which does not say who it is"):
            lock.hold(tmp_path, said.append, patience_s=0.0)
        who = {"pid": 77, "host": "node7", "since": "2026-01-31T12:00:00+01:00"}
        (tmp_path / ".lock.holder").write_text(json.dumps(who))
        with pytest.raises(ConfigError, match="process 77 on node7, since 2026-01-31T12") as caught:
            lock.hold(tmp_path, said.append, patience_s=0.0)
        assert "Wait for it, or choose another folder." in str(caught.value)
        assert "waiting up to 0 s" in said[-1] and "process 77 on node7" in said[-1]
        # It ends while the next one waits.
        ending = threading.Timer(0.1, lambda: fcntl.flock(other, fcntl.LOCK_UN))
        ending.start()
        open_output_dir(tmp_path, "model", probe=True, say=said.append)
        ending.join()
    assert json.loads((tmp_path / ".lock.holder").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("named", [False, True])
def test_a_swap_that_was_cut_short_is_undone_or_finished_by_the_next_run(
    named: bool, tmp_path: Path
) -> None:
    """A process that dies between the two renames of a result."""
    old = tmp_path / ".final.old"
    old.mkdir()
    (old / "adapter_model.safetensors").write_text("earlier")
    (old / "README.md").write_text("mine")
    if named:
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "adapter_model.safetensors").write_text("new")
    open_output_dir(tmp_path, "model", probe=True)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", ".lock.holder", "final"}
    result = (tmp_path / "final" / "adapter_model.safetensors").read_text()
    assert result == ("new" if named else "earlier")
    assert (tmp_path / "final" / "README.md").read_text() == "mine"


def test_a_run_that_ends_while_it_draws_keeps_the_picture_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clips = tmp_path / "samples" / "samples.png", torch.zeros(1, 1, 1, 8, 8)
    draw_samples(path, clips, None, ["one"])
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def cut(figure: Figure, target: Any, **settings: Any) -> None:
        Path(target).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(KeyboardInterrupt):
        draw_samples(path, clips, None, ["one"])
    assert path.read_bytes() == before
