"""FSDP2 (``fully_shard``): parameters are replaced by DTensors under unchanged names.

An optimizer built before sharding holds the old tensors and trains nothing, silently; identity is
what is checked here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.base import (
    Layout,
    Pieces,
    Sharder,
    Slice,
    Weight,
    buffers,
    flat_view,
    innermost,
    internals_moved,
    local,
    names_by_id,
    parameters_with_names,
    pieces_by_identity,
    whole_slices,
)
from dist_layerlr.sharders.ranges import dim0_range


class Fsdp2Sharder(Sharder):
    """Local shards of DTensors, dimension 0 chunked.

    HSDP replicates them over the mesh's other dimension.
    """

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        """Whether any module is an ``FSDPModule``."""
        from torch.distributed.fsdp import FSDPModule

        return any(isinstance(module, FSDPModule) for module in model.modules())

    def _read_layout(self) -> Layout:
        return Layout(name="fsdp2", shards=True)

    def slices(self) -> list[Slice]:
        """Whole local shards: an optimizer holds the DTensors."""
        self.reshard()
        return whole_slices(self.model)

    def pieces(self, optimizer: Any) -> Pieces:
        """Local shards, by identity."""
        self.reshard()
        inner = innermost(optimizer)
        found, strangers = pieces_by_identity(inner.param_groups, names_by_id(self.model), _place)
        return Pieces(pieces=found, strangers=strangers, optimizer=inner)

    def weights(self) -> list[Weight]:
        """Local shards; parameters that FSDP2 was told to ignore are whole.

        Raises:
            PlanMismatch: a shard along another dimension than 0, which is no run of elements.
        """
        self.reshard()
        found: list[Weight] = []
        for param, name, aliases in parameters_with_names(self.model):
            if isinstance(param, DTensor) and _is_cut_elsewhere(param):
                raise PlanMismatch(
                    f"{name} is placed as {param.placements}; only shards along dimension 0 can be"
                    " saved or loaded. Call fully_shard without shard_placement_fn."
                )
            start, _, replicas = _place(param)
            flat, home = flat_view(param)
            found.append(
                Weight(
                    name=name,
                    start=start,
                    numel=flat.numel(),
                    aliases=aliases,
                    tensor=flat,
                    home=home,
                    shape=tuple(param.shape),
                    trainable=param.requires_grad,
                    replicas=replicas,
                )
            )
        return found + buffers(self.model)

    def refresh(self) -> None:
        """Drop what is gathered, if anything is: the next forward gathers it anew."""
        self.reshard()

    def reshard(self) -> None:
        """Put the sharded parameters back into their modules.

        A unit swaps gathered, plain parameters in for its DTensors until it reshards. After a
        forward without a backward (an evaluation) the root, or with ``reshard_after_forward`` as a
        number every unit, is still gathered: its modules then show tensors that nobody trains.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # costs nothing where the unit is sharded already


def _is_cut_elsewhere(param: DTensor) -> bool:
    """Whether a shard lies along another dimension than 0, so that it is no run of elements."""
    return any(p.is_shard() and not p.is_shard(0) for p in param.placements)


def _place(param: Tensor) -> tuple[int, int, int]:
    """(start, local elements, replicas)."""
    if not isinstance(param, DTensor):
        return 0, param.numel(), world_size()
    # Mesh dimensions that shard the parameter together number its shards, the last one fastest;
    # those that replicate it (HSDP) multiply the ranks that step each element.
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
    if _is_cut_elsewhere(param):
        return 0, here, replicas
    if numel != here:
        raise internals_moved(
            "FSDP2", "torch 2.13", f"the shard of a {tuple(param.shape)} DTensor ({here} elements)"
        )
    return start, here, replicas
