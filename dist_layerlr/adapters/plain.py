"""One process, or DDP: parameters keep their identity, every rank steps all of them."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from dist_layerlr.adapters.base import ReadBack, read_groups


class PlainAdapter:
    """No sharding. DDP only adds a ``module.`` prefix."""

    label = "unsharded"

    def handles(self, model: nn.Module) -> bool:
        """True: the last adapter asked."""
        if any(c.__name__ == "DistributedDataParallel" for c in type(model).__mro__):
            self.label = "ddp"
        return True

    def read_back(self, model: nn.Module, optimizer: Any) -> ReadBack:
        """Read the groups by parameter identity. Ranks hold whole copies."""
        replicas = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return read_groups(optimizer.param_groups, model, lambda p: (p.numel(), replicas))
