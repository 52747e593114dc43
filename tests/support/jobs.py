"""Runs of launch/train.py: as a user starts them, or in forked ranks.

A process that a launcher starts imports torch, diffusers and DeepSpeed first, which takes far
longer than the few steps of a test. Forked ranks have these imports from this process, so that
only what a launcher itself does is tested with a real one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot  # noqa: F401

# What the trainer imports only when it needs it, imported before the fork: these take longer than
# a whole run of a test.
import peft  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel  # noqa: F401
from safetensors.torch import load_file

from launch import train
from launch.trainer import loop, outputs, resume, samples  # noqa: F401
from launch.trainer.data import digits  # noqa: F401
from tests.support.drivers import start_deepspeed
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
TORCHRUN = ["torchrun", "--nproc_per_node"]
DEADLINE_S = 900.0
"""A run ends in seconds; this only ends a hang, and leaves room for a busy machine."""
Config = dict[str, Any]


def free_port() -> int:
    """A port that nobody listens on: other tests may run beside this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ended(NamedTuple):
    """How one rank's run ended."""

    status: int
    said: str
    complaint: str


def call_of(config: Config, folder: Path, *flags: str) -> list[str]:
    """Write the config, and return train.py's arguments; the run's files go to ``folder/out``."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return [*flags, "--config", str(file), "--output-dir", str(folder / "out")]


def run(command: list[str], config: Config, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the main job as a user would, in a process of its own."""
    program = [str(BIN / command[0]), f"--master_port={free_port()}", *command[1:]]
    if command[0] == "python":
        program = [sys.executable, *command[1:]]
    return subprocess.run(
        [*program, *call_of(config, folder)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        cwd=folder,
    )


def run_in_ranks(ranks: int, calls: list[list[str]]) -> list[Ended]:
    """Run train.py's main with each call's arguments, one after the other, on forked ranks of one
    process group. Returns how each call ended on rank 0; fails where another rank ended otherwise.
    """
    by_rank = run_ranks(_run_all, ranks, calls)
    for others in zip(*by_rank, strict=True):
        assert len({ended.status for ended in others}) == 1, others
    return by_rank[0]


def _run_all(rank: int, world_size: int, calls: list[list[str]]) -> list[Ended]:
    if any("--deepspeed_config" in call for call in calls):
        start_deepspeed()
    train.stop = lambda: None  # else the first run would end the process group of the others
    ended = []
    for call in calls:
        said, complaint = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            status = train.main(call)
        ended.append(Ended(status, said.getvalue(), complaint.getvalue()))
        dist.barrier()  # rank 0 still writes what the next run may read
    return ended


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a run in ``folder`` exported."""
    # An adapter lies there in a second form too, whose name comes later.
    file = min((folder / "out" / "final").glob("*.safetensors"))
    return load_file(str(file))


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    # Buffers may be masks, and empty.
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a if a[n].numel())


def as_lora(config: Config) -> Config:
    """The same run with adapters instead of a full finetune."""
    block = {k: v for k, v in config["per_layer_lr"].items() if k != "no_decay"}
    return {
        **config,
        "training_method": "lora",
        "adapter": {"type": "lora", "rank": 4, "alpha": 4},
        "per_layer_lr": {**block, "lora_plus_ratio": 4},
    }
