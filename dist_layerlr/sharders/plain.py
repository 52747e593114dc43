"""One process, or DDP: parameters keep their identity, every rank steps all of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_layerlr.adapters.base import (
    AUTO,
    SEGMENTED,
    Pieces,
    Weight,
    buffers,
    innermost,
    names_by_id,
    parameters_with_names,
    pieces_by_identity,
    resolve,
    segment_whole,
    whole_weight,
    world_size,
)
from dist_layerlr.groups import param_groups
from dist_layerlr.plan import Plan
from dist_layerlr.segmented import MakeOptimizer


class PlainAdapter:
    """No sharding. DDP only adds a ``module.`` prefix."""

    def __init__(self) -> None:
        self.label = "unsharded"

    def handles(self, model: nn.Module) -> bool:
        """True: the last adapter asked."""
        if _is_ddp(model):
            self.label = "ddp"
        return True

    def attach(self, plan: Plan, model: nn.Module, make: MakeOptimizer, emission: str) -> Optimizer:
        """Segments under DDP. A bare model may yet go to DeepSpeed or Accelerate: ordinary groups, unless asked."""
        segmented = emission == SEGMENTED or (emission == AUTO and _is_ddp(model))
        return segment_whole(plan, model, make) if segmented else make(param_groups(plan, model))

    def pieces(self, model: nn.Module, optimizer: Any) -> Pieces:
        """Whole parameters, by identity. Ranks hold copies."""
        inner = innermost(optimizer)
        ranks = world_size()
        found, strangers = pieces_by_identity(inner.param_groups, names_by_id(model), lambda p: (0, p.numel(), ranks))
        return resolve(Pieces(pieces=found, strangers=strangers, optimizer=inner))

    def weights(self, model: nn.Module) -> list[Weight]:
        """Everything, whole."""
        ranks = world_size()
        found = [
            whole_weight(name, param, ranks, aliases=aliases, trainable=param.requires_grad)
            for param, name, aliases in parameters_with_names(model)
        ]
        return found + buffers(model)

    def refresh(self, model: nn.Module, optimizer: Any) -> None:
        """Nothing to do: there are no copies."""


def _is_ddp(model: nn.Module) -> bool:
    return any(c.__name__ == "DistributedDataParallel" for c in type(model).__mro__)
