"""Whole tensors of a live model on rank 0, one at a time, whatever shards it."""

from __future__ import annotations

from collections import defaultdict
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_layerlr import ranks
from dist_layerlr.ranks import everyone, transport_device
from dist_layerlr.sharders import Weight, sharder_of

Part = tuple[int, int, int]
"""(rank, first element, number of elements)."""


class LiveWeights:
    """Weights and persistent buffers of a model by canonical name.

    ZeRO's fp32 masters where there are any.

    Collective: every rank builds one, and asks for the same names in the same order. Do not train
    in between.
    """

    def __init__(self, model: nn.Module):
        self.writes = ranks.rank() == 0
        runs = sharder_of(model).true_weights()
        self.table: dict[str, Weight] = {}
        """One run of each name, for what all runs have in common."""
        for run in runs:
            self.table.setdefault(run.name, run)
        self._mine = {(run.name, run.start): run for run in runs if run.numel}
        parts: dict[str, list[Part]] = defaultdict(list)
        for rank, held in enumerate(
            everyone([(r.name, r.start, r.numel) for r in self._mine.values()])
        ):
            for name, start, numel in held:
                parts[name].append((rank, start, numel))
        self._parts = {
            name: _cover(parts[name], prod(run.shape), name) for name, run in self.table.items()
        }

    def fetch(self, name: str) -> Tensor | None:
        """The whole tensor on the CPU of rank 0; None on other ranks. Collective."""
        run, rank = self.table[name], ranks.rank()
        whole = torch.empty(prod(run.shape), dtype=run.dtype) if rank == 0 else None
        for owner, start, numel in self._parts[name]:
            mine = self._mine[name, start].tensor[:numel].detach() if owner == rank else None
            if owner == rank != 0:
                assert mine is not None
                dist.send(mine.to(transport_device()).contiguous().view(torch.uint8), 0)
            elif whole is not None:
                whole[start : start + numel] = (
                    mine if mine is not None else _receive(numel, run.dtype, owner)
                )
        return None if whole is None else whole.view(run.shape)


def find_not_finite(model: nn.Module) -> str | None:
    """Name of a weight of which this rank holds a NaN or an infinity; None: there is none here."""
    return next(
        (
            run.name
            for run in sharder_of(model).true_weights()
            if not bool(torch.isfinite(run.tensor).all())
        ),
        None,
    )


def _receive(numel: int, dtype: torch.dtype, owner: int) -> Tensor:
    part = torch.empty(numel, dtype=dtype, device=transport_device())
    dist.recv(part.view(torch.uint8), owner)
    return part


def _cover(parts: list[Part], size: int, name: str) -> list[Part]:
    """Every element once: replicas are left out, rank 0's own runs preferred."""
    chosen: list[Part] = []
    end = 0
    for rank, start, numel in sorted(parts, key=lambda part: (part[1], part[0])):
        if start == end and end < size:
            chosen.append((rank, start, numel))
            end += numel
    assert end == size, f"{name}: ranks hold {end} of {size} elements"
    return chosen
