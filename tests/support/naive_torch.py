"""Torch's own sharders, wrapped as a user would, for the silent failures."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP

from tests.support.naive import (
    Weights,
    adamw,
    copy_of,
    make_model,
    naive_groups,
    train,
)
from tests.support.toys import Block


def fsdp1(model: nn.Module, *, flat: bool) -> FSDP:
    policy = ModuleWrapPolicy({Block})
    return FSDP(
        model, use_orig_params=not flat, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )


def fsdp1_flat(model: nn.Module) -> FSDP:
    return fsdp1(model, flat=True)


def fsdp1_orig(model: nn.Module) -> FSDP:
    return fsdp1(model, flat=False)


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {"ddp": DDP, "fsdp1 orig": fsdp1_orig, "fsdp1_flat": fsdp1_flat, "fsdp2": fsdp2}


def whole(model: nn.Module) -> Weights:
    """Full weights under plain names, whatever wraps the model."""
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model, writeback=False):
            named = [
                (n.replace("_fsdp_wrapped_module.", ""), p.detach().clone())
                for n, p in model.named_parameters()
            ]
            return dict(named)
    inner = model.module if isinstance(model, DDP) else model
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for name, param in inner.named_parameters()
    }


def trained(steps: int, make: Any = adamw, groups: Any = None) -> Weights:
    """Weights of one unsharded process after some steps on the global batch."""
    model = make_model()
    train(model, make(groups or naive_groups(model.named_parameters())), steps=steps)
    return copy_of(model)


def steps_taken(optimizer: torch.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values() if "step" in state}
