"""SIGINT and SIGTERM finish the step in progress, save, and end with status 0, on all ranks
together."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from launch import train
from tests.support.faults import rows, wait_until
from tests.support.jobs import (
    DEADLINE_S,
    ROOT,
    TRAIN,
    Ended,
    call_of,
    largest_difference,
    run_in_ranks,
    weights,
)
from tests.support.ranks import run_ranks

LONG = 100_000
"""Steps that would take hours."""


def in_training(folder: Path) -> bool:
    return len(rows(folder / "out")) >= 3


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
    done = rows(folder / "out")[-1]["step"] + 1
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
    (ended,) = run_ranks(train_until_signal, 1, arguments, number)
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


SHARDERS = {
    **{name: ["--sharding", name] for name in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2")},
    **{
        f"zero {stage}": ["--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json")]
        for stage in range(4)
    },
}
STOPPED_IN, LATER = 6, 4
"""The microbatch in which the signal comes, the second of the second step's four; and how many the
run after it does, which is that step again."""


@pytest.mark.parametrize(
    "sharders",
    [
        pytest.param(("fsdp1_flat", "fsdp2", "zero 2"), id="some"),
        pytest.param(tuple(SHARDERS), id="all", marks=pytest.mark.full),
    ],
)
def test_a_stop_between_microbatches_saves_the_step_before_at_once(
    sharders: tuple[str, ...],
    run_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of a large model takes longer than the launcher waits."""
    from launch.trainer.batches import Batches

    read, seen = Batches.read, -8  # a whole run comes first

    def interrupted(*args: Any) -> Any:
        nonlocal seen
        seen += 1
        # Every second run is stopped; the one after it goes on.
        if seen == STOPPED_IN:
            os.kill(os.getpid(), signal.SIGTERM)
        if seen == STOPPED_IN + LATER:
            seen = 0
        return read(*args)

    run_config["train"].update(steps=2, micro_batch=1)
    monkeypatch.setattr(Batches, "read", interrupted)
    calls = [call_of(run_config, tmp_path / "whole", "--sharding", "ddp")]
    for sharder in sharders:
        call = call_of(run_config, tmp_path / sharder, *SHARDERS[sharder], "--resume", "latest")
        calls += [call, call]
    whole, *hurt = run_in_ranks(2, calls)
    assert "finished 2 steps" in whole.said, whole.complaint
    for sharder, stopped, resumed in zip(sharders, hurt[::2], hurt[1::2], strict=True):
        assert (stopped.status, resumed.status) == (0, 0), (stopped, resumed)
        out = tmp_path / sharder / "out"
        assert f"saved checkpoint {out}/checkpoints/step_00000001 after 1 steps" in stopped.said
        assert f"stopped by a signal after 1 steps; weights in {out}/final" in stopped.said
        assert "step_00000001 after 1 steps" in resumed.said, sharder
        assert [row["step"] for row in rows(out)] == [0, 1]
        difference = largest_difference(weights(tmp_path / sharder), weights(tmp_path / "whole"))
        assert difference <= 1e-5, sharder
