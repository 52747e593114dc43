"""One process, or DDP: parameters keep their identity, every rank steps all of them."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.base import (
    Layout,
    ParamGroup,
    Piece,
    Pieces,
    Sharder,
    Slice,
    Weight,
    buffers,
    parameters_with_names,
    pieces_of_parameters,
    whole_slices,
    whole_weight,
)
from dist_layerlr.sharders.model import Kinds


class PlainSharder(Sharder):
    """No sharding. DDP only adds a ``module.`` prefix."""

    @classmethod
    def handles(cls, kinds: Kinds) -> bool:
        """True: it is the last sharder asked."""
        return True

    def _read_layout(self) -> Layout:
        is_ddp = any(c.__name__ == "DistributedDataParallel" for c in type(self.model).__mro__)
        return Layout(name="ddp" if is_ddp else "none")

    def slices(self) -> list[Slice]:
        """Whole parameters."""
        return whole_slices(self.model)

    def pieces(self, optimizer: Any) -> Pieces:
        """Whole parameters, by identity. Ranks hold copies."""
        return pieces_of_parameters(
            self.model, optimizer, partial(_whole_piece, ranks=world_size())
        )

    def weights(self) -> list[Weight]:
        """Everything, whole."""
        ranks = world_size()
        found = [
            whole_weight(name, param, ranks, aliases=aliases, trainable=param.requires_grad)
            for param, name, aliases in parameters_with_names(self.model)
        ]
        return found + buffers(self.model)


def _whole_piece(name: str, param: Tensor, group: ParamGroup, *, ranks: int) -> list[Piece]:
    return [
        Piece(
            name=name,
            start=0,
            numel=param.numel(),
            owner=param,
            offset=0,
            group=group,
            replicas=ranks,
        )
    ]
