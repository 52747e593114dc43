"""``memory.stagehand`` under each sharder: the library streams blocks, or the sharder offloads.

One process and DDP stream. FSDP2 and ZeRO-3 own their parameters' storage, so they offload
themselves, told how far ahead to fetch. The others cannot fetch a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.offload import StreamPolicy

ZERO_STAGE = 3
"""The first ZeRO stage that partitions parameters, so that they can leave the device."""
CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast rounds to bf16 before every use."""
FOLLOWED = {"prefetch_window", "pinned_pool_mb"}
"""What a sharder's own offload can follow; it keeps every shard on the host, pinned."""


class Stagehand(Enum):
    """Who keeps weights in host memory when ``memory.stagehand`` is on."""

    STREAMS = "dist_layerlr.offload streams the blocks"
    DELEGATES = "the sharder's own offload, with the same window"
    REFUSES = "nobody can"


def refused(what: str, why: str) -> ConfigError:
    """The one wording for a sharder that cannot keep weights in host memory."""
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
            if isinstance(module, CAST_BY_AUTOCAST):
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
        raise refused(
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
