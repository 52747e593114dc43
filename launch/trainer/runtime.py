"""Who this process is among the ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, LayerLRError
from launch.trainer.runlog import RunLog

# NCCL's own limit of 10 minutes is short for rank 0 reading a large checkpoint from a network disk.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
LOWER = "Lower the learning rates, or set train.grad_clip."
"""What to do when training runs into NaN or infinity."""


class Diverged(LayerLRError):
    """Training ran into NaN or infinity; unlike other errors it comes after work was done."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    log: RunLog = field(default_factory=RunLog, compare=False)
    """Keeps what ``say`` prints."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line, on the first rank only."""
        if self.is_main:
            print(line, flush=True)
            self.log.write(line)

    def barrier(self) -> None:
        """Wait for all ranks, so that none leaves while another still talks to it."""
        if self.world_size > 1:
            dist.barrier()


def launched_world_size() -> int:
    """World size that the launcher set; 1 without one."""
    return _launched("WORLD_SIZE", 1)


def launched_rank() -> int:
    """Rank that the launcher set; 0 without one."""
    return _launched("RANK", 0)


def _launched(name: str, low: int) -> int:
    """Read an environment variable of torchrun's protocol; ``low`` where it is not set."""
    text = os.environ.get(name, str(low))
    if not text.isdecimal() or int(text) < low:
        raise fields.invalid(
            name, text, f"an integer >= {low}", " Launchers set it; unset it to run without one."
        )
    return int(text)


def start(*, alone: bool, log: RunLog) -> Runtime:
    """Join the process group (gloo on CPU, NCCL on CUDA) and choose the device.

    Args:
        alone: This process trains by itself, or only prints a plan: it joins no group.
        log: Takes what this rank says.

    Raises:
        ConfigError: A variable of the launcher's is missing or wrong.
    """
    local_rank = _launched("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        # Before the group exists: NCCL and DeepSpeed take the current device as this rank's own.
        torch.cuda.set_device(device)
    if not alone and not dist.is_initialized():
        # gloo beside NCCL, so that checkpoints in host memory can be exchanged without the cards.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        try:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        except ValueError as error:
            raise ConfigError(
                f"Cannot join the process group: {error}. Start it with torchrun."
            ) from None
    world_size = 1 if alone else launched_world_size()
    return Runtime(
        rank=launched_rank(),
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        log=log,
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
