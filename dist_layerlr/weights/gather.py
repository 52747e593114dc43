"""Whole tensors of a live model on rank 0, one at a time, whatever shards it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_layerlr import ranks
from dist_layerlr.ranks import everyone, transport_device
from dist_layerlr.sharders import Span, Weight, sharder_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpan(Span):
    """A span, and the rank that holds it."""

    rank: int


class LiveWeights:
    """Weights and persistent buffers of a model by canonical name.

    Where ZeRO keeps fp32 masters, they are given in place of the low-precision copies.

    Collective: every rank builds one, and asks for the same names in the same order. Do not train
    in between.
    """

    def __init__(self, model: nn.Module):
        self.writes = ranks.rank() == 0
        self.table: dict[str, Weight] = {}
        """One span of each name, for what all spans of it have in common."""
        self._mine: dict[tuple[str, int], Weight] = {}
        for weight in sharder_of(model).true_weights():
            self.table.setdefault(weight.name, weight)
            if weight.numel:
                self._mine[weight.name, weight.start] = weight
        # Every rank learns who holds what, so that each fetch is sends and receives alone: sender
        # and receiver agree on the sizes without another message.
        held = [(w.name, w.start, w.numel) for w in self._mine.values()]
        held_by_rank = everyone(held)
        spans: dict[str, list[RankSpan]] = {name: [] for name in self.table}
        for rank, rows in enumerate(held_by_rank):
            for name, start, numel in rows:
                span = RankSpan(name=name, start=start, numel=numel, rank=rank)
                spans.setdefault(name, []).append(span)
        self._spans: dict[str, list[RankSpan]] = {}
        for name, weight in self.table.items():
            self._spans[name] = _cover(spans[name], prod(weight.shape), name)

    def fetch(self, name: str) -> Tensor | None:
        """The whole tensor on the CPU of rank 0; None on other ranks. Collective."""
        weight, rank = self.table[name], ranks.rank()
        whole = torch.empty(prod(weight.shape), dtype=weight.dtype) if rank == 0 else None
        for span in self._spans[name]:
            part: Tensor | None = None
            if span.rank == rank:
                part = self._mine[name, span.start].tensor[: span.numel].detach()
            if whole is not None:
                received = _receive(span, weight.dtype) if part is None else part
                whole[span.start : span.start + span.numel] = received
            elif part is not None:
                # Bytes, because gloo and NCCL do not send every dtype.
                dist.send(part.to(transport_device()).contiguous().view(torch.uint8), 0)
        return None if whole is None else whole.view(weight.shape)


def find_not_finite(model: nn.Module) -> str | None:
    """Name of a weight of which this rank holds a NaN or an infinity; None: there is none here."""
    for weight in sharder_of(model).true_weights():
        if not bool(torch.isfinite(weight.tensor).all()):
            return weight.name
    return None


def _receive(span: RankSpan, dtype: torch.dtype) -> Tensor:
    part = torch.empty(span.numel, dtype=dtype, device=transport_device())
    dist.recv(part.view(torch.uint8), span.rank)
    return part


def _cover(spans: list[RankSpan], size: int, name: str) -> list[RankSpan]:
    """Choose spans that hold every element once. Of replicas, the lowest rank's is taken."""
    chosen: list[RankSpan] = []
    end = 0
    # Rank 0 sorts before the others, because its own span needs no message.
    for span in sorted(spans, key=lambda span: (span.start, span.rank)):
        if span.start == end and end < size:
            chosen.append(span)
            end += span.numel
    assert end == size, f"{name}: ranks hold {end} of {size} elements"
    return chosen
