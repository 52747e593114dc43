"""SIGINT and SIGTERM finish the step in progress, save, and end with status 0, on all ranks
together."""

from __future__ import annotations

import contextlib
import io
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
from tests.support.jobs import DEADLINE_S, TRAIN, Ended, call_of
from tests.support.ranks import run_ranks

LONG = 100_000
"""Steps that would take hours."""


def in_training(folder: Path) -> bool:
    return len(rows(folder)) >= 3


def rows(folder: Path) -> list[dict[str, Any]]:
    file = folder / "out" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(done: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """Wait for a condition; the deadline only ends a hang."""
    end = time.monotonic() + DEADLINE_S
    while not done():
        assert not ended(), "the run ended by itself"
        assert time.monotonic() < end, "no progress"
        time.sleep(0.05)


def train_until_signal(rank: int, world_size: int, arguments: list[str], number: int) -> Ended:
    """A run in this process, which another thread sends a signal once it trains."""
    import threading

    folder = Path(arguments[-1]).parent
    over = threading.Event()

    def send() -> None:
        wait_until(lambda: in_training(folder), over.is_set)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    said, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        status = train.main(arguments)
    over.set()
    sender.join()
    return Ended(status, said.getvalue(), complaint.getvalue())


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
    run_config["train"]["steps"] = LONG
    arguments = call_of(run_config, tmp_path)
    (ended,) = run_ranks(train_until_signal, 1, arguments, number, deadline_s=DEADLINE_S)
    assert ended.status == 0, ended.complaint
    check_saved(tmp_path, ended.said)


def test_a_signal_to_one_rank_stops_all_ranks_together(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    program = [torchrun, "--standalone", "--nproc_per_node", "2", TRAIN, "--sharding", "fsdp2"]
    run_config["train"]["steps"] = LONG
    process = subprocess.Popen(
        [*program, *call_of(run_config, tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    wait_until(lambda: in_training(tmp_path), lambda: process.poll() is not None)
    ranks = [
        child.pid for child in psutil.Process(process.pid).children() if TRAIN in child.cmdline()
    ]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGTERM)
    said, complaint = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, complaint
    check_saved(tmp_path, said)


def signal_while_saving(rank: int, world_size: int, arguments: list[str]) -> int:
    """Two signals, as every rank gets on Ctrl-C, at the moment when training is over and nothing is
    saved."""
    from launch.trainer import outputs

    save = outputs.save_result

    def interrupted(*args: Any) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return save(*args)

    outputs.save_result = interrupted
    return train.main(arguments)


def test_signals_while_saving_do_not_cut_it_short(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run_config["train"]["steps"] = 1
    arguments = ["--config", str(write_config(run_config)), "--output-dir", str(tmp_path / "out")]
    assert run_ranks(signal_while_saving, 1, arguments) == [0]
    assert (tmp_path / "out" / "final" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "out" / "verify.json").exists()
