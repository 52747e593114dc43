"""SIGINT and SIGTERM finish the step in progress, save, and end with status 0, on all ranks
together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from launch import train
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = str(ROOT / "launch" / "train.py")


def start(program: list[str], config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """Start a run that would take hours, and wait until it has done three steps."""
    config["train"]["steps"] = 100_000
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    process = subprocess.Popen(
        [*program, "--config", str(file), "--output-dir", str(folder / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    wait_until(lambda: len(rows(folder)) >= 3, process)
    return process


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "out" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(
    done: Callable[[], bool], process: subprocess.Popen[str], deadline_s: float = 900.0
) -> None:
    end = time.monotonic() + deadline_s
    while not done():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no progress"
        time.sleep(0.05)


def check_saved(folder: Path, said: str) -> None:
    done = rows(folder)[-1]["step"] + 1
    assert f"stopped by a signal after {done} steps" in said
    with safe_open(
        str(folder / "out" / "final" / "diffusion_pytorch_model.safetensors"), framework="pt"
    ) as file:
        assert file.metadata()["step"] == str(done)
    assert (folder / "out" / "verify.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process_finishes_the_step_and_saves(
    number: int, run_config: dict[str, Any], tmp_path: Path
) -> None:
    process = start([sys.executable, TRAIN], run_config, tmp_path)
    process.send_signal(number)
    said, complaint = process.communicate(timeout=900)
    assert process.returncode == 0, complaint
    check_saved(tmp_path, said)


def test_a_signal_to_one_rank_stops_all_ranks_together(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    program = [torchrun, "--standalone", "--nproc_per_node", "2", TRAIN, "--sharding", "fsdp2"]
    process = start(program, run_config, tmp_path)
    ranks = [
        child.pid for child in psutil.Process(process.pid).children() if TRAIN in child.cmdline()
    ]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGTERM)
    said, complaint = process.communicate(timeout=900)
    assert process.returncode == 0, complaint
    check_saved(tmp_path, said)


def signal_while_saving(rank: int, world_size: int, arguments: list[str]) -> int:
    """Two signals, as every rank gets on Ctrl-C, at the moment when training is over and nothing is
    saved."""
    from launch.trainer import outputs

    save = outputs.save_weights

    def interrupted(*args: Any) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args)

    outputs.save_weights = interrupted
    return train.main(arguments)


def test_signals_while_saving_do_not_cut_it_short(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run_config["train"]["steps"] = 1
    arguments = ["--config", str(write_config(run_config)), "--output-dir", str(tmp_path / "out")]
    assert run_ranks(signal_while_saving, 1, arguments) == [0]
    assert (tmp_path / "out" / "final" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "out" / "verify.json").exists()
