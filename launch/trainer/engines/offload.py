"""``memory.stagehand`` under each sharder: the library streams blocks, or the sharder offloads.

One process and DDP stream. FSDP2 and ZeRO-3 own their parameters' storage, so they offload
themselves, told how far ahead to fetch. The others cannot fetch a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.offload import StreamPolicy
from launch.trainer.options import FULL, RunOptions

if TYPE_CHECKING:
    from launch.trainer.engines.sharding import Sharding

ZERO_STAGE = 3
"""The first ZeRO stage that partitions parameters, so that they can leave the device."""
# Layers whose weights autocast rounds to bf16 before every use.
_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLLOWED = {"prefetch_window", "pinned_pool_mb"}
"""What a sharder's own offload can follow; it keeps every shard on the host, pinned."""


class Stagehand(Enum):
    """Who keeps weights in host memory when ``memory.stagehand`` is on."""

    STREAMS = "dist_layerlr.offload streams the blocks"
    DELEGATES = "the sharder's own offload, with the same window"
    REFUSES = "nobody can"


def check_streaming(options: RunOptions, sharding: Sharding) -> None:
    """Refuse a sharder that cannot do what ``memory.stagehand`` asks for.

    ZeRO stages are checked with the ds_config.

    Raises:
        ConfigError: names the sharder and what to pass instead.
    """
    if options.stream is None:
        return
    if sharding.stagehand is Stagehand.REFUSES:
        raise _refused(sharding.flag, sharding.refuses)
    if sharding.stagehand is Stagehand.DELEGATES:
        _check_delegated(options.stream, sharding.name)
    elif sharding.refuses and options.training_method == FULL:
        raise _refused(f"{sharding.flag} in a full finetune", sharding.refuses)


def _check_delegated(policy: StreamPolicy, sharding: str) -> None:
    """Refuse the policy's fields that a sharder's own offload has no counterpart for."""
    plain = StreamPolicy()
    for field in ("mode", "resident_blocks", "stream_trainable", "host", "host_dtype", "min_numel"):
        given, default = getattr(policy, field), getattr(plain, field)
        if given != default:
            raise ConfigError(
                f"Invalid memory.stagehand.{field}={given!r} with {sharding}, whose own offload"
                f" takes {' and '.join(sorted(_FOLLOWED))} only: remove it, or train with"
                " --sharding none or ddp."
            )


def _refused(what: str, why: str) -> ConfigError:
    return ConfigError(
        f"Invalid memory.stagehand.enabled=True with {what}: {why}. Pass --sharding none, ddp"
        " (LoRA) or fsdp2, or --deepspeed_config ds_configs/zero3.json; or set it to false."
    )


def hold_in_bf16(blocks: Iterable[nn.Module]) -> None:
    """Keep frozen layers of the blocks in bf16, half the memory and half the traffic.

    Bitwise the same under bf16 autocast, which rounds the weights of these layers before every use.
    """
    for block in blocks:
        for module in block.modules():
            if isinstance(module, _CAST_BY_AUTOCAST):
                for param in module.parameters(recurse=False):
                    if not param.requires_grad:
                        param.data = param.data.to(torch.bfloat16)


def offload_fsdp2(device: torch.device) -> dict[str, Any]:
    """Return arguments of ``fully_shard`` that keep shards on the host."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")}


def prefetch_fsdp2(blocks: Sequence[Any], window: int) -> None:
    """Have every block gather the next ``window`` ones, in both directions."""
    # Forward runs the blocks in order and backward in the reverse order; fully_shard alone
    # prefetches one block in backward and none in forward.
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[i + 1 : i + 1 + window]))
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, i - window) : i])))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring buffers to the device; FSDP2 offloads parameters only."""
    # Through .data: modules that hold a reference to a buffer go on seeing the same tensor.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def offload_zero(
    zero: Mapping[str, Any], policy: StreamPolicy, block_numel: int, path: str
) -> dict[str, Any]:
    """Return a ``zero_optimization`` block with parameters on the host, a ring on the device.

    Args:
        zero: The block of the ds_config; offload devices that it names stay.
        policy: Gives the window of blocks that are fetched ahead.
        block_numel: Parameters of the largest block.
        path: Of the ds_config, for the message.

    Raises:
        ConfigError: another stage than 3.
    """
    stage = zero.get("stage", 0)
    if stage != ZERO_STAGE:
        raise _refused(
            f"{path} (ZeRO stage {stage})", "stages below 3 keep whole parameters on the device"
        )
    # DeepSpeed counts both limits in parameters, the policy counts blocks.
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "offload_param": host,
        "offload_optimizer": host,
        **zero,
        "stage3_prefetch_bucket_size": policy.prefetch_window * block_numel,
        "stage3_max_live_parameters": policy.slots * block_numel,
    }
