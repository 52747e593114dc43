"""Put a meta-device model under torch's own sharders, its memory there but not yet filled.

There is one function per sharder. ``sharding.py`` says which row uses which.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_layerlr.plan import Plan
from dist_layerlr.sharders import materialize
from launch.trainer.engines.offload import move_buffers, offload_fsdp2, prefetch_fsdp2
from launch.trainer.families import get_family
from launch.trainer.options import RunOptions
from launch.trainer.runtime import Runtime

Wrap = Callable[[nn.Module, Plan, RunOptions, Runtime], nn.Module]
"""(meta model, its plan, options, this rank) -> the wrapped model, whose weights have memory."""


def whole(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """One process holds the whole model."""
    materialize(model, runtime.device)
    return model


def ddp(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """Every rank holds a whole copy."""
    materialize(model, runtime.device)
    return replicate(model, runtime)


def replicate(model: nn.Module, runtime: Runtime) -> nn.Module:
    """Wrap a model that has memory in DDP."""
    from torch.nn.parallel import DistributedDataParallel

    # On CPU, DDP refuses device_ids.
    ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def fsdp2(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """``fully_shard`` over all ranks."""
    return _fully_shard(model, plan, options, runtime, {"shard": runtime.world_size})


def hsdp(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """``fully_shard`` inside a node, replicated over nodes; on one node, over two halves of it."""
    world = runtime.world_size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if local < world:
        replicas = world // local
    else:
        # One node: two replicas where its ranks can be halved, else a single one.
        replicas = 2 if world % 2 == 0 else 1
    mesh = {"replicate": replicas, "shard": world // replicas}
    return _fully_shard(model, plan, options, runtime, mesh)


def fsdp1(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """FSDP1 with original parameters kept."""
    return _flatten(model, plan, options, runtime, use_orig_params=True)


def fsdp1_flat(model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime) -> nn.Module:
    """FSDP1 with flat parameters only, as Accelerate's default."""
    return _flatten(model, plan, options, runtime, use_orig_params=False)


def _fully_shard(
    model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime, shape: dict[str, int]
) -> nn.Module:
    """Apply ``fully_shard`` on a mesh of ``shape``, {dimension's name: ranks}."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The loop never writes into an output in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(runtime.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    blocks = blocks_of(model, plan)
    offload = {} if options.stream is None else offload_fsdp2(runtime.device)
    # Blocks first: fully_shard of the root takes the parameters that no inner call has taken.
    for block in blocks:
        fully_shard(block, mesh=mesh, **offload)
    fully_shard(model, mesh=mesh, **offload)
    # Only now, so that each rank allocates its shards and never a whole parameter.
    materialize(model, runtime.device if options.stream is None else torch.device("cpu"))
    if options.stream is not None:
        prefetch_fsdp2(blocks, options.stream.prefetch_window)
        move_buffers(model, runtime.device)
    return model


def _flatten(
    model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime, *, use_orig_params: bool
) -> nn.Module:
    """Wrap units one by one; each gets memory of its own just before it is flattened."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    units = blocks_of(model, plan)
    if not use_orig_params:
        units += _trainable_leaves(model)
        for path in get_family(options.model_type, options.objective).flat_units:
            units.append(model.get_submodule(path))
    # By identity: nn.Module compares by identity too, but a set of ids says so.
    wrapped = {id(unit) for unit in units}
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in wrapped),
        param_init_fn=lambda module: materialize(module, runtime.device, recurse=False),
        use_orig_params=use_orig_params,
        device_id=runtime.device,
    )


def _trainable_leaves(model: nn.Module) -> list[nn.Module]:
    """List the adapter layers of a frozen model: a flat parameter cannot mix both kinds."""
    if all(p.requires_grad for p in model.parameters()):
        return []
    leaves = []
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            leaves.append(module)
    return leaves


def blocks_of(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """List the modules that the plan calls blocks, in order."""
    # A dict keeps the order in which the plan names the stacks; a set would not.
    stacks = dict.fromkeys(e.stack for e in plan.entries.values() if e.stack is not None)
    blocks: list[nn.Module] = []
    for stack in stacks:
        container: Any = model.get_submodule(stack)
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            blocks += container.children()
        else:
            blocks.append(container)
    return blocks
