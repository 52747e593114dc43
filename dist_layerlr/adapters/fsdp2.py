"""FSDP2 (``fully_shard``): parameters are replaced by DTensors under unchanged names.

An optimizer built before sharding holds the old tensors and trains nothing, silently; identity is what is checked here.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from dist_layerlr.adapters.base import ReadBack, read_groups


class Fsdp2Adapter:
    """Local shards of DTensors, dim 0 chunked; HSDP replicates them over the mesh's other dimension."""

    label = "fsdp2"

    def handles(self, model: nn.Module) -> bool:
        """Whether any module is an ``FSDPModule``."""
        from torch.distributed.fsdp import FSDPModule

        return any(isinstance(module, FSDPModule) for module in model.modules())

    def read_back(self, model: nn.Module, optimizer: Any) -> ReadBack:
        """Read the groups by parameter identity, counting local elements."""
        return read_groups(optimizer.param_groups, model, _count)


def _count(param: nn.Parameter) -> tuple[int, int]:
    if not isinstance(param, DTensor):
        return param.numel(), dist.get_world_size()
    replicas = 1
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
        if placement.is_replicate():
            replicas *= size
    return param.to_local().numel(), replicas
