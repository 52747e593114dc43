"""Put a meta-device model under torch's own sharders, its memory there but not yet filled.

One function per sharder.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_layerlr.plan.entries import Plan
from dist_layerlr.sharders import materialize
from launch.trainer.engines.offload import move_buffers, offload_fsdp2, prefetch_fsdp2
from launch.trainer.families import get_family
from launch.trainer.options import RunOptions
from launch.trainer.runtime import Runtime

Wrap = Callable[[nn.Module, Plan, RunOptions, Runtime], nn.Module]


def whole(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """One process, the whole model."""
    materialize(model, runtime.device)
    return model


def ddp(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """A whole copy on every rank."""
    materialize(model, runtime.device)
    return replicate(model, runtime)


def replicate(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Wrap a model that has memory in DDP."""
    from torch.nn.parallel import DistributedDataParallel

    ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def fsdp2(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """``fully_shard`` over all ranks."""
    return _fully_shard(model, plan, options, runtime, (runtime.world_size,), ("shard",))


def hsdp(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """``fully_shard`` inside a node, replicated over nodes; on one node, over two halves of it."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    replicas = (
        runtime.world_size // local if local < runtime.world_size else 2 - runtime.world_size % 2
    )
    shape = (replicas, runtime.world_size // replicas)
    return _fully_shard(model, plan, options, runtime, shape, ("replicate", "shard"))


def fsdp1(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """FSDP1 with original parameters kept."""
    return _flatten(model, plan, options, runtime, use_orig_params=True)


def fsdp1_flat(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """FSDP1 with flat parameters only, Accelerate's default."""
    return _flatten(model, plan, options, runtime, use_orig_params=False)


WRAPS: dict[str, Wrap] = {
    "none": whole,
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp1_flat": fsdp1_flat,
    "fsdp2": fsdp2,
    "hsdp": hsdp,
}


def _fully_shard(
    model: nn.Module,
    plan: Plan,
    options: RunOptions,
    runtime: Runtime,
    shape: tuple[int, ...],
    names: tuple[str, ...],
) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The loop never writes into an output in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(runtime.device.type, shape, mesh_dim_names=names)
    blocks = blocks_of(model, plan)
    offload = {} if options.stream is None else offload_fsdp2(runtime.device)
    for block in blocks:
        fully_shard(block, mesh=mesh, **offload)
    fully_shard(model, mesh=mesh, **offload)
    materialize(model, runtime.device if options.stream is None else torch.device("cpu"))
    if options.stream is not None:
        prefetch_fsdp2(blocks, options.stream.prefetch_window)
        move_buffers(model, runtime.device)
    return model


def _flatten(
    model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime, *, use_orig_params: bool
) -> nn.Module:
    """Wrap units one by one; each has memory of its own just before it is flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    units = {id(m) for m in blocks_of(model, plan)}
    if not use_orig_params:
        units |= {id(m) for m in _trainable_leaves(model)}
        units |= {
            id(model.get_submodule(path)) for path in get_family(options.model_type).flat_units
        }
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in units),
        param_init_fn=lambda module: materialize(module, runtime.device, recurse=False),
        use_orig_params=use_orig_params,
        device_id=runtime.device,
    )


def _trainable_leaves(model: nn.Module) -> list[nn.Module]:
    """Adapter layers of a frozen model: a flat parameter cannot mix frozen and trainable ones."""
    if all(p.requires_grad for p in model.parameters()):
        return []
    return [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


def blocks_of(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """The modules that the plan calls blocks, in order."""
    stacks = dict.fromkeys(e.stack for e in plan.entries.values() if e.stack is not None)
    blocks: list[nn.Module] = []
    for stack in stacks:
        container: Any = model.get_submodule(stack)
        blocks += (
            list(container.children())
            if isinstance(container, (nn.ModuleList, nn.Sequential))
            else [container]
        )
    return blocks
