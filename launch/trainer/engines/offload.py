"""``memory.stagehand`` under each sharder: blocks streamed by us, or the sharder's own offload with
the same window.

One process and DDP stream. FSDP2 and ZeRO-3 own their parameters' storage, so they offload
themselves, told how far ahead to fetch. The others cannot fetch a block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.offload import StreamPolicy
from launch.trainer.options import FULL, RunOptions

STREAMED = ("none", "ddp")
DELEGATED = ("fsdp2", "hsdp")
ZERO_STAGE = 3
_CAST_BY_AUTOCAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FOLLOWED = {"prefetch_window", "pinned_pool_mb"}
"""What a sharder's own offload can follow; it keeps every shard on the host, pinned."""


def check_streaming(options: RunOptions, sharding: str) -> None:
    """Refuse a sharder that cannot do what ``memory.stagehand`` asks for.

    ZeRO stages are checked with the ds_config.

    Raises:
        ConfigError: names the sharder and what to pass instead.
    """
    if options.stream is None:
        return
    if sharding == "ddp" and options.training_method == FULL:
        raise _refused(
            "--sharding ddp in a full finetune", "its gradient reduction needs them on the device"
        )
    if sharding not in (*STREAMED, *DELEGATED, "zero"):
        raise _refused(f"--sharding {sharding}", "it keeps flat parameters on the device")
    if sharding not in STREAMED:
        _check_delegated(options.stream, sharding)


def _check_delegated(policy: StreamPolicy, sharding: str) -> None:
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
    """Arguments of ``fully_shard`` that keep shards on the host."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")}


def prefetch_fsdp2(blocks: Sequence[Any], window: int) -> None:
    """Have every block gather the next ``window`` ones, in both directions."""
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[i + 1 : i + 1 + window]))
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, i - window) : i])))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring buffers to the device; FSDP2 offloads parameters only."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def offload_zero(
    zero: Mapping[str, Any], policy: StreamPolicy, block_numel: int, path: str
) -> dict[str, Any]:
    """A ``zero_optimization`` block that keeps parameters on the host and holds a ring of blocks on
    the device.

    Args:
        zero: as in the ds_config; its own offload devices stay.
        policy: the window.
        block_numel: parameters of the largest block.
        path: of the ds_config, for the message.

    Raises:
        ConfigError: another stage than 3.
    """
    stage = zero.get("stage", 0)
    if stage != ZERO_STAGE:
        raise _refused(
            f"{path} (ZeRO stage {stage})", "stages below 3 keep whole parameters on the device"
        )
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "offload_param": host,
        "offload_optimizer": host,
        **zero,
        "stage3_prefetch_bucket_size": policy.prefetch_window * block_numel,
        "stage3_max_live_parameters": policy.slots * block_numel,
    }
