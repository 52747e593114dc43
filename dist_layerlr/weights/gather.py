"""Whole tensors of a live model on rank 0, one at a time, whatever shards it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_layerlr import ranks
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.ranks import alike, everyone, transport_device
from dist_layerlr.sharders import Span, Weight, sharder_of
from dist_layerlr.sharders.distinct import distinct_names
from dist_layerlr.sharders.replicas import differing


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
        """List who holds what.

        Raises:
            PlanMismatch: on all ranks alike, when a sharder cannot tell, ranks hold other names
                (pipeline stages), or some elements are on no rank.
        """
        self.writes = ranks.rank() == 0
        self.table: dict[str, Weight] = {}
        """One span of each name, for what all spans of it have in common."""
        self._mine: dict[tuple[str, int], Weight] = {}
        for weight in alike(lambda: sharder_of(model).true_weights()):
            self.table.setdefault(weight.name, weight)
            if weight.numel:
                self._mine[weight.name, weight.start] = weight
        self._distinct = distinct_names(model, self.table)
        # Every rank learns who holds what, so that each fetch is sends and receives alone: sender
        # and receiver agree on the sizes without another message.
        held = [(w.name, w.start, w.numel) for w in self._mine.values()]
        held_by_rank = everyone((list(self.table), held))
        spans: dict[str, list[RankSpan]] = {name: [] for name in self.table}
        for rank, (names, rows) in enumerate(held_by_rank):
            # All ranks compare the same lists, and raise together.
            _check_same_names(held_by_rank[0][0], names, rank)
            for name, start, numel in rows:
                span = RankSpan(name=name, start=start, numel=numel, rank=rank)
                spans.setdefault(name, []).append(span)
        self._spans: dict[str, list[RankSpan]] = {}
        for name, weight in self.table.items():
            self._spans[name] = _cover(spans[name], prod(weight.shape), name)

    def check(self, names: Iterable[str]) -> None:
        """Refuse names of which ranks hold different values: one of them would be lost. Collective.

        Buffers are left out: each rank's own statistics (BatchNorm) differ, and rank 0's are given.

        Raises:
            PlanMismatch: on all ranks alike, naming the parameter.
        """
        wanted = set(names)
        for name in sorted(wanted & self._distinct):
            raise PlanMismatch(
                f"Cannot gather {name}: it differs by rank on purpose (mark_distinct), and there is"
                " one tensor of a name in a file. Save a checkpoint, which keeps every rank's."
            )
        copies: list[Weight] = []
        for weight in self._mine.values():
            if weight.name in wanted and weight.replicas > 1 and not weight.is_buffer:
                copies.append(weight)
        for found in differing(copies):
            raise PlanMismatch(f"Cannot gather {found.text}")

    def fetch(self, name: str) -> Tensor | None:
        """The whole tensor on the CPU of rank 0; None on other ranks. Collective."""
        weight, rank = self.table[name], ranks.rank()
        whole = torch.empty(prod(weight.shape), dtype=weight.dtype) if rank == 0 else None
        # What a rank holds travels in one message, in however many runs it lies.
        for holder, spans in groupby(sorted(self._spans[name], key=_holder), key=_holder):
            self._fetch_from(holder, list(spans), weight.dtype, whole)
        return None if whole is None else whole.view(weight.shape)

    def _fetch_from(
        self, holder: int, spans: list[RankSpan], dtype: torch.dtype, whole: Tensor | None
    ) -> None:
        parts: list[Tensor] = []
        if holder == ranks.rank():
            for span in spans:
                parts.append(self._mine[span.name, span.start].tensor[: span.numel].detach())
        if whole is not None:
            if not parts:
                numels = [span.numel for span in spans]
                parts = list(_receive(holder, sum(numels), dtype).split_with_sizes(numels))
            for span, part in zip(spans, parts, strict=True):
                whole[span.start : span.start + span.numel] = part
        elif parts:
            # A single run is sent from where it lies; several are put together first.
            sent = parts[0] if len(parts) == 1 else torch.cat(parts)
            # Bytes, because gloo and NCCL do not send every dtype.
            dist.send(sent.to(transport_device()).contiguous().view(torch.uint8), 0)


def find_not_finite(model: nn.Module) -> str | None:
    """Name of a weight of which this rank holds a NaN or an infinity; None: there is none here."""
    for weight in sharder_of(model).true_weights():
        if not bool(torch.isfinite(weight.tensor).all()):
            return weight.name
    return None


def _holder(span: RankSpan) -> int:
    return span.rank


def _receive(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    part = torch.empty(numel, dtype=dtype, device=transport_device())
    dist.recv(part.view(torch.uint8), rank)
    return part


def _check_same_names(first: list[str], other: list[str], rank: int) -> None:
    if first == other:
        return
    odd = sorted(set(first) ^ set(other)) or ["their order"]
    raise PlanMismatch(
        f"Ranks 0 and {rank} hold different parameters: {odd[:5]} are on one of them only. A model"
        " that is spread over pipeline stages cannot be gathered; export each stage by itself."
    )


def _cover(spans: list[RankSpan], size: int, name: str) -> list[RankSpan]:
    """Choose spans that hold every element once. Of replicas, the lowest rank's is taken."""
    chosen: list[RankSpan] = []
    end = 0
    # Rank 0 sorts before the others, because its own span needs no message.
    for span in sorted(spans, key=lambda span: (span.start, span.rank)):
        if span.start == end and end < size:
            chosen.append(span)
            end += span.numel
    if end != size:
        raise PlanMismatch(
            f"Cannot gather {name}: ranks hold {end} of {size} elements. A sharder wraps a part of"
            " the model on a part of the ranks."
        )
    return chosen
