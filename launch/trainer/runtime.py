"""Who this process is among the ranks, and how ranks fail together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, LayerLRError

Result = TypeVar("Result")
_SHARED = "raised_on_all_ranks"
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


class Diverged(LayerLRError):
    """Training ran into NaN or infinity; unlike other errors it comes after work was done."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One rank."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks, so that none leaves while another still talks to it."""
        if self.world_size > 1:
            dist.barrier()

    def everyone(self, mine: Result) -> list[Result]:
        """What each rank contributes, by rank. Collective."""
        found = [mine] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, mine)
        return found

    def agree(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` on every rank; if any rank fails, all raise the first failing rank's error.

        Costs one all-reduce of one number, less than a millisecond on gloo, unless a rank fails.

        Raises:
            LayerLRError: of this rank, or the same class and text as on the rank that failed.
        """
        error: LayerLRError | None = None
        try:
            result = work()
        except LayerLRError as caught:
            error = caught
        if self.world_size > 1 and _any_rank(error is not None):
            error = next(e for e in self.everyone(error) if e is not None)
        if error is not None:
            setattr(error, _SHARED, True)
            raise error
        return result


def _any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. Collective."""
    count = torch.tensor([int(flag)])
    dist.all_reduce(count)
    return bool(count > 0)


def is_shared(error: LayerLRError) -> bool:
    """Whether all ranks raise this error: they agreed on it, or it came before they met and they
    see the same input.
    """
    return getattr(error, _SHARED, False) or not (dist.is_available() and dist.is_initialized())


def launched_world_size() -> int:
    """World size that the launcher set; 1 without one."""
    return _launched("WORLD_SIZE", 1)


def launched_rank() -> int:
    """Rank that the launcher set; 0 without one."""
    return _launched("RANK", 0)


def _launched(name: str, low: int) -> int:
    """An environment variable of torchrun's protocol; ``low`` where it is not set."""
    text = os.environ.get(name, str(low))
    if not text.isdecimal() or int(text) < low:
        raise fields.invalid(
            name, text, f"an integer >= {low}", " Launchers set it; unset it to run without one."
        )
    return int(text)


def check_launch(sharding: str, global_batch: int) -> None:
    """Refuse a launcher that does not fit the sharding, before any process group exists.

    Raises:
        ConfigError: a sharder without a launcher, several ranks without a sharder, or a batch that
            ranks cannot share.
    """
    world = launched_world_size()
    if sharding != "none" and "RANK" not in os.environ:
        zero = sharding == "zero"
        command = "deepspeed --num_gpus 2" if zero else "torchrun --nproc_per_node 2"
        flag = "--deepspeed_config" if zero else f"--sharding {sharding}"
        raise ConfigError(
            f"Invalid {flag}: it needs a launcher. Start it with: {command} launch/train.py ..."
        )
    if sharding == "none" and world > 1:
        raise ConfigError(
            f"Invalid --sharding none with {world} ranks: each would train alone. "
            "Pass --sharding ddp or fsdp2, or --deepspeed_config ds_configs/zero2.json."
        )
    if global_batch % world:
        raise ConfigError(
            f"Invalid train.global_batch={global_batch}: must be a multiple of the world size"
            f" {world}. The nearest are {global_batch - global_batch % world} and"
            f" {global_batch + world - global_batch % world}."
        )


_FSDP1, _FSDP2 = ("fsdp1", "fsdp1_flat"), ("fsdp2", "hsdp")


def check_accelerate_env(sharding: str) -> None:
    """Refuse an ``accelerate launch`` whose own sharding options contradict ``--sharding``.

    Accelerate only passes them on, as environment variables; train.py shards by ``--sharding``
    alone.

    Args:
        sharding: what train.py will do; `zero` for ``--deepspeed_config``.

    Raises:
        ConfigError: names what Accelerate was told, and both ways out.
    """
    told, fits = _accelerate_wants()
    if told is None or sharding in fits:
        return
    asked = "--deepspeed_config" if sharding == "zero" else f"--sharding {sharding}"
    instead = (
        {"zero": "--deepspeed_config FILE"}.get(fits[0], f"--sharding {fits[0]}") if fits else ""
    )
    choice = f"Pass {instead} to train.py, or launch" if fits else "Launch"
    raise ConfigError(
        f"Invalid {asked}: accelerate launch was told {told}, which train.py would ignore. {choice}"
        " with `accelerate launch --multi_gpu` and no sharding of its own (check its config file)."
    )


def _accelerate_wants() -> tuple[str | None, tuple[str, ...]]:
    """What Accelerate's launcher was told, and the shardings that mean the same.

    Names as of accelerate 1.15.
    """
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return "--use_deepspeed", ("zero",)
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        return "--use_megatron_lm", ()
    if _flag("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        return f"--use_fsdp --fsdp_version {version}", _FSDP2 if version == "2" else _FSDP1
    return None, ()


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def start(sharding: str) -> Runtime:
    """Join the process group (gloo on CPU, NCCL on CUDA) and choose the device."""
    local_rank = _launched("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if sharding != "none" and not dist.is_initialized():
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT
            )
        except ValueError as error:  # a variable of the launcher's is missing or wrong
            raise ConfigError(
                f"Cannot join the process group: {error}. Start it with torchrun."
            ) from None
    world = 1 if sharding == "none" else launched_world_size()
    return Runtime(rank=launched_rank(), world_size=world, local_rank=local_rank, device=device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
