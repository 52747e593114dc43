"""Runs that are killed, stopped or out of disk, again and again, each time under another sharder:
they end in the weights of the undisturbed run, and cost no earlier result."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.trainer import launcher
from tests.support.faults import (
    GONE_S,
    Fault,
    all_gone,
    fill_disk,
    freeze_a_rank_and_kill_the_launcher,
    kill_first_rank,
    kill_last_rank,
    kill_launcher,
    rows,
    started,
    stop,
    wait_until,
)
from tests.support.jobs import (
    BIN,
    ROOT,
    TRAIN,
    call_of,
    free_port,
    largest_difference,
    run_in_ranks,
    weights,
)

Config = dict[str, Any]
SHARDERS = {
    **{name: ["--sharding", name] for name in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2", "hsdp")},
    **{
        f"zero {stage}": ["--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json")]
        for stage in range(4)
    },
}
FAULTS: tuple[Fault, ...] = (
    kill_first_rank,
    kill_last_rank,
    fill_disk,
    kill_launcher,
    stop,
    freeze_a_rank_and_kill_the_launcher,
)
SAVING = (stop, kill_launcher, freeze_a_rank_and_kill_the_launcher)
"""After these the ranks write what they have, where they can."""
EARLIER = b"the result of an earlier run"


class Chain:
    """One run, hurt and started again until it is through."""

    def __init__(self, config: Config, folder: Path, steps: int):
        train = {**config["train"], "steps": steps, "save_every": 1, "keep": 2, "micro_batch": 2}
        self._config = {**config, "train": train}
        self._folder, self._steps = folder, steps
        self._out, self._saved = folder / "out", False
        (self._out / "final").mkdir(parents=True)
        (self._out / "final" / "adapter_model.safetensors").write_bytes(EARLIER)

    def hurt(self, sharder: str, fault: Fault, steps: int) -> bool:
        """Start or go on, and do harm after ``steps`` more steps. False: so many are not left."""
        before = len(rows(self._out))
        if before + steps > self._steps:
            return False
        with started(self._arguments(sharder), 2) as job:
            wait_until(
                lambda: len(rows(self._out)) >= before + steps,
                lambda: all_gone(job.ranks, 0.0),
            )
            with contextlib.suppress(psutil.NoSuchProcess):  # the run was through first
                fault(job)
            assert all_gone(job.ranks), f"{fault.__name__}: ranks are left after {GONE_S:g} s"
            status = job.wait()
            through = "finished" in job.said
            assert through or (status == 0) == (fault is stop), f"{fault.__name__}: {job.said}"
            if fault is fill_disk and not through:
                assert job.said.count("train.py: error: ") == 1, job.said
            self._saved |= fault in SAVING or through
        if not self._saved:
            found = (self._out / "final" / "adapter_model.safetensors").read_bytes()
            assert found == EARLIER, fault.__name__
        return True

    def finish(self, sharder: str) -> dict[str, Any]:
        """Let it train to its end. Returns the weights."""
        with started(self._arguments(sharder), 2) as job:
            assert job.wait() == 0, job.said
        assert [row["step"] for row in rows(self._out)] == list(range(self._steps))
        return weights(self._folder)

    def _arguments(self, sharder: str) -> list[str]:
        return call_of(self._config, self._folder, *SHARDERS[sharder], "--resume", "latest")


def undisturbed(config: Config, folder: Path, steps: int) -> dict[str, Any]:
    config = {**config, "train": {**config["train"], "steps": steps}}
    (ended,) = run_in_ranks(1, [call_of(config, folder)])
    assert ended.status == 0, ended.complaint
    return weights(folder)


def test_a_run_that_is_hurt_again_and_again_ends_in_the_weights_of_one_that_is_not(
    run_config: Config, tmp_path: Path
) -> None:
    steps = 20
    chain = Chain(run_config, tmp_path / "hurt", steps)
    assert chain.hurt("fsdp2", kill_first_rank, 3)
    assert chain.hurt("ddp", fill_disk, 2)
    assert chain.hurt("zero 2", kill_launcher, 2)
    assert chain.hurt("fsdp2", stop, 2)
    wanted = undisturbed(run_config, tmp_path / "whole", steps)
    assert largest_difference(wanted, chain.finish("ddp")) <= 1e-5


@pytest.mark.full
def test_forty_faults_over_all_sharders(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "ORPHAN_S", 5.0)  # a rank that waits for a frozen one takes it
    chooser, steps, done, runs = random.Random(0), 60, 0, 0
    wanted = undisturbed(run_config, tmp_path / "whole", steps)
    while done < 40:
        chain = Chain(run_config, tmp_path / f"run{runs}", steps)
        going = True
        while going and done < 40:
            fault = FAULTS[done % len(FAULTS)]
            going = chain.hurt(chooser.choice(list(SHARDERS)), fault, chooser.randint(1, 6))
            done += going
        assert largest_difference(wanted, chain.finish(chooser.choice(list(SHARDERS)))) <= 1e-5
        runs += 1
    print(f"{done} faults in {runs} runs of {steps} steps")


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("torchrun", id="torchrun"),
        pytest.param("deepspeed", id="deepspeed", marks=pytest.mark.full),
    ],
)
def test_ranks_whose_launcher_is_killed_save_end_and_leave_the_folder_free(
    program: str, run_config: Config, tmp_path: Path
) -> None:
    run_config["train"]["steps"] = 100_000
    flags = SHARDERS["zero 2" if program == "deepspeed" else "fsdp2"]
    counts = {
        "torchrun": ["--standalone", "--nproc_per_node", "2"],
        "deepspeed": ["--num_gpus", "2", f"--master_port={free_port()}"],
    }
    arguments = call_of(run_config, tmp_path, *flags)
    process = subprocess.Popen(
        [str(BIN / program), *counts[program], TRAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )
    out = tmp_path / "out"
    wait_until(lambda: len(rows(out)) >= 3, lambda: process.poll() is not None)
    below = psutil.Process(process.pid).children(recursive=True)
    ranks = [
        child for child in below if TRAIN in child.cmdline() and "launch.py" not in child.name()
    ]
    os.kill(process.pid, signal.SIGKILL)
    try:
        assert all_gone(ranks), "ranks train on"
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()
        said, _ = process.communicate()
    done = len(rows(out))
    assert said.count("train.py: error: the launcher is gone") == 1
    assert f"step_{done:08} after {done} steps" in said
    again = [*arguments, "--resume", "latest", "--max-steps", str(done + 1)]
    (ended,) = run_in_ranks(1, [["--config", *again[again.index("--config") + 1 :]]])
    assert ended.status == 0 and f"resumed {out}" in ended.said, ended.complaint
