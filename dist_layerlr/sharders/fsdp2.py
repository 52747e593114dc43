"""FSDP2 (``fully_shard``): parameters are replaced by DTensors under unchanged names.

An optimizer built before sharding holds the old tensors and trains nothing, silently; identity is what is checked here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_layerlr.adapters.base import (
    GROUPS,
    Pieces,
    Weight,
    buffers,
    flat_view,
    innermost,
    internals_moved,
    names_by_id,
    parameters_with_names,
    pieces_by_identity,
    resolve,
    segment_whole,
    world_size,
)
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.groups import ParamGroup, param_groups
from dist_layerlr.plan import Plan
from dist_layerlr.segmented import MakeOptimizer, local
from dist_layerlr.segments import dim0_range


class Fsdp2Adapter:
    """Local shards of DTensors, dimension 0 chunked; HSDP replicates them over the mesh's other dimension."""

    def __init__(self) -> None:
        self.label = "fsdp2"

    def handles(self, model: nn.Module) -> bool:
        """Whether any module is an ``FSDPModule``."""
        from torch.distributed.fsdp import FSDPModule

        return any(isinstance(module, FSDPModule) for module in model.modules())

    def attach(self, plan: Plan, model: nn.Module, make: MakeOptimizer, emission: str) -> Optimizer:
        """Segments on local shards, or ordinary groups, split where a foreach call could not take the tensors together."""
        if emission != GROUPS:
            return segment_whole(plan, model, make)
        return make([part for group in param_groups(plan, model) for part in _split_by_mesh(group)])

    def pieces(self, model: nn.Module, optimizer: Any) -> Pieces:
        """Local shards, by identity."""
        inner = innermost(optimizer)
        found, strangers = pieces_by_identity(inner.param_groups, names_by_id(model), _place)
        return resolve(Pieces(pieces=found, strangers=strangers, optimizer=inner))

    def weights(self, model: nn.Module) -> list[Weight]:
        """Local shards; parameters that FSDP2 was told to ignore are whole.

        Raises:
            PlanMismatch: a shard along another dimension than 0, which is no run of elements.
        """
        _reshard(model)
        found: list[Weight] = []
        for param, name, aliases in parameters_with_names(model):
            if isinstance(param, DTensor) and any(p.is_shard() and not p.is_shard(0) for p in param.placements):
                raise PlanMismatch(
                    f"{name} is placed as {param.placements}; only shards along dimension 0 can be saved or loaded. "
                    "Call fully_shard without shard_placement_fn."
                )
            start, _, replicas = _place(param)
            flat, home = flat_view(param)
            found.append(
                Weight(
                    name=name, aliases=aliases, tensor=flat, home=home, start=start, shape=tuple(param.shape),
                    trainable=param.requires_grad, replicas=replicas,
                )
            )  # fmt: skip
        return found + buffers(model)

    def refresh(self, model: nn.Module, optimizer: Any) -> None:
        """Drop what is gathered, if anything is: the next forward gathers it anew."""
        _reshard(model)


def _reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place; after a forward without backward the root stays gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _split_by_mesh(group: ParamGroup) -> list[ParamGroup]:
    """One group per device mesh: foreach and fused calls cannot mix DTensors of two meshes, or DTensors and tensors."""
    parts: dict[Any, list[Tensor]] = {}
    for param in group["params"]:
        parts.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    names = [group["name"]] + [f"{group['name']}@{i}" for i in range(1, len(parts))]
    return [{**group, "params": params, "name": name} for name, params in zip(names, parts.values(), strict=True)]


def _place(param: Tensor) -> tuple[int, int, int]:
    """(start, local elements, replicas)."""
    if not isinstance(param, DTensor):
        return 0, param.numel(), world_size()
    replicas, rank, ranks = 1, 0, 1
    coordinate = param.device_mesh.get_coordinate()
    for dim, placement in enumerate(param.placements):
        size = param.device_mesh.size(dim)
        if placement.is_replicate():
            replicas *= size
        elif coordinate is not None:
            rank, ranks = rank * size + coordinate[dim], ranks * size
    here = local(param).numel()
    start, numel = dim0_range(param.shape, ranks, rank)
    if any(p.is_shard() and not p.is_shard(0) for p in param.placements):
        return 0, here, replicas
    if numel != here:
        raise internals_moved("FSDP2", "torch 2.13", f"the shard of a {tuple(param.shape)} DTensor ({here} elements)")
    return start, here, replicas
