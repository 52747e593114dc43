"""What ``prepare_accelerate`` refuses before it prepares anything."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations.checks import refuse_ds_config, refuse_replaced_optimizer
from dist_layerlr.optim import Schedule
from dist_layerlr.ranks import world_size

DEEPSPEED, FSDP = "DEEPSPEED", "FSDP"
_DATA_PARALLEL = "MULTI_"
"""Accelerate's types for DDP: MULTI_GPU, MULTI_CPU, MULTI_XPU ..."""


def refuse_unproven(accelerator: Any, make: Any, schedule: Any, others: Sequence[Any]) -> None:
    """Refuse what would change the plan, or in which nothing was proven.

    Raises:
        ConfigError: names the argument, its value and what to do.
    """
    _refuse_built(make, schedule, others)
    kind = accelerator.distributed_type.value
    if kind not in ("NO", FSDP, DEEPSPEED) and not kind.startswith(_DATA_PARALLEL):
        raise ConfigError(
            f"Invalid distributed_type {kind}: nothing is proven there. Use DDP, FSDP or DeepSpeed."
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise ConfigError(
            "Invalid parallelism_config: tensor, context and sequence parallelism are not proven"
            " inside Accelerate. Leave it out, or use attach and verify in a loop of your own."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and kind != FSDP:
        raise ConfigError(
            f"Invalid fsdp_plugin: Accelerate has dropped it (it does so on CPU) for {kind}."
            " Remove it, or train on CUDA."
        )
    if accelerator.num_processes != world_size():
        raise ConfigError(
            f"Invalid start: Accelerate knows of {accelerator.num_processes} processes, the process"
            f" group has {world_size()} (on CPU its DeepSpeed plugin counts one). Train on CUDA."
        )
    if kind == DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        refuse_ds_config(config, scheduler="prepare_accelerate(..., schedule=...)")
        refuse_replaced_optimizer(config)


def _refuse_built(make: Any, schedule: Any, others: Sequence[Any]) -> None:
    from accelerate.utils import DummyOptim, DummyScheduler

    # A maker is a class or a function; a DummyOptim stands for a block of the ds_config, which
    # knows no names.
    if not callable(make):
        raise ConfigError(
            f"Invalid make: a {type(make).__name__}. Give what builds the optimizer from groups:"
            " torch.optim.AdamW, or lambda groups: torch.optim.AdamW(groups, fused=True)."
        )
    if schedule is not None and not isinstance(schedule, Schedule) and not callable(schedule):
        raise ConfigError(
            f"Invalid schedule: a {type(schedule).__name__}. Give a Schedule, or what builds the"
            " scheduler: lambda optimizer: get_scheduler('cosine', optimizer, ...)."
        )
    for other in others:
        if isinstance(other, (Optimizer, LRScheduler, DummyOptim, DummyScheduler)):
            raise ConfigError(
                f"Invalid argument: a {type(other).__name__} beside the planned optimizer. Give"
                " what builds it as make or schedule; only loaders and the like go here."
            )
