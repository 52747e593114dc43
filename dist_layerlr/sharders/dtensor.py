"""DTensors: tensor, sequence and expert parallelism, and what FSDP2 makes of parameters.

Any placement on any mesh is taken: ``placement`` says which elements the local part holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_layerlr.errors import PlanMismatch
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
    flat_view,
    local,
    parameters_with_names,
    pieces_of_parameters,
    whole_slices,
)
from dist_layerlr.sharders.model import Kinds
from dist_layerlr.sharders.placement import place


class DTensorSharder(Sharder):
    """Local parts of DTensors that somebody has placed (``parallelize_module``, or by hand)."""

    @classmethod
    def handles(cls, kinds: Kinds) -> bool:
        """Whether any parameter is a DTensor."""
        return any(issubclass(kind, DTensor) for kind in kinds.parameters)

    def _read_layout(self) -> Layout:
        return Layout(name="dtensor", shards=True, meshes=True)

    def slices(self) -> list[Slice]:
        """Whole local parts: an optimizer holds the DTensors."""
        self.reshard()
        return whole_slices(self.model)

    def pieces(self, optimizer: Any) -> Pieces:
        """Local parts, by identity; one piece for each run of elements."""
        self.reshard()
        pieces_of = partial(_pieces_of, ranks=world_size())
        return pieces_of_parameters(self.model, optimizer, pieces_of)

    def weights(self) -> list[Weight]:
        """Local parts, one weight for each run; plain parameters beside them are whole.

        Raises:
            PlanMismatch: a placement that cannot be read, or several runs of a tensor that lies in
                memory in another order.
        """
        self.reshard()
        found: list[Weight] = []
        for param, name, aliases in parameters_with_names(self.model):
            found += _weights(param, name, aliases)
        return found + buffers(self.model)


def _pieces_of(name: str, param: Tensor, group: ParamGroup, *, ranks: int) -> Iterator[Piece]:
    placed = place(name, param, local(param), ranks)
    # Runs come in the order in which the local part holds their elements.
    offset = 0
    for start, numel in placed.runs:
        yield Piece(
            name=name,
            group=group,
            owner=param,
            offset=offset,
            numel=numel,
            start=start,
            replicas=placed.replicas,
        )
        offset += numel


def _weights(param: nn.Parameter, name: str, aliases: tuple[str, ...]) -> Iterator[Weight]:
    placed = place(name, param, local(param), world_size())
    flat, home = flat_view(param)
    whole = Weight(
        name=name,
        start=placed.runs[0][0],
        numel=flat.numel(),
        aliases=aliases,
        tensor=flat,
        home=home,
        shape=tuple(param.shape),
        trainable=param.requires_grad,
        replicas=placed.replicas,
    )
    if len(placed.runs) == 1:
        yield whole
        return
    if home is not None:
        raise PlanMismatch(
            f"{name} is cut along a later dimension than the first and lies in memory in another"
            " order (channels_last, or transposed): it cannot be saved or loaded. Make it"
            " contiguous before it is placed."
        )
    offset = 0
    for start, numel in placed.runs:
        part = flat[offset : offset + numel]
        yield replace(whole, start=start, numel=numel, tensor=part)
        offset += numel
