"""Whether ranks that claim to hold the same elements hold the same values.

A sharder counts a tensor that it did not cut as a copy of the other ranks'. Experts outside the
mesh, parameters that DDP or FSDP2 was told to ignore, and pipeline stages with equal names are no
copies: whoever keeps one rank's values for all ranks loses the others'.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from dist_layerlr import ranks
from dist_layerlr.ranks import alike, everyone, transport_device
from dist_layerlr.sharders.base import HeldSpan

_CHUNK = 1 << 20
"""Elements that are summed at once: their products take 8 MiB."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_MIX = 0x5851F42D4C957F2D
"""Multiplier of Knuth's MMIX generator: chunks that change places change the sum."""
_COLUMNS = 1 << 14
"""Names that are compared at once: every rank holds two numbers for each name and rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two ranks hold the same elements of a tensor, with other values."""

    name: str
    rank: int
    other: int

    @property
    def found(self) -> str:
        """What is wrong."""
        return (
            f"{self.name}: ranks {self.rank} and {self.other} hold different values of the same"
            " elements"
        )

    @property
    def text(self) -> str:
        """The same, and what to do."""
        return (
            f"{self.found}. Nobody synchronises them (experts of one rank, parameters that DDP or"
            " FSDP2 ignores, pipeline stages with equal names), or they are meant to differ: then"
            " say so with dist_layerlr.sharders.mark_distinct(model, [patterns])."
        )


def differing(spans: Iterable[HeldSpan]) -> list[Difference]:
    """Compare the bits of everything that several ranks hold. Collective; the same on all ranks.

    Each rank reads its own elements once, where they are; two numbers for each name travel.

    Args:
        spans: of this rank. What only this rank holds may be among them.
    """
    if ranks.world_size() == 1:
        return []
    mine = alike(lambda: _digests(spans))
    names = _names_of_all(sorted(mine))
    found: list[Difference] = []
    for first in range(0, len(names), _COLUMNS):
        found += _compare(names[first : first + _COLUMNS], mine)
    return found


def fingerprint(tensor: Tensor) -> Tensor:
    """A number that follows from the bits of a flat tensor, on its device: int64, modulo 2**64."""
    bits = tensor.detach().view(_BITS[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    weights = _weights(bits.device)
    for first in range(0, bits.numel(), _CHUNK):
        part = bits[first : first + _CHUNK].to(torch.int64)
        total = total * _MIX + (part * weights[: part.numel()]).sum()
    return total


@lru_cache(maxsize=4)
def _weights(device: torch.device) -> Tensor:
    """Odd numbers, the same on all ranks: each element counts with one of its own."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(1 << 62), 1 << 62, (_CHUNK,), generator=generator)
    return (drawn * 2 + 1).to(device)


def _digests(spans: Iterable[HeldSpan]) -> dict[str, tuple[int, int]]:
    """{name: (which elements are held, their bits)}; (0, 0) where none are."""
    by_name: dict[str, list[HeldSpan]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    # Names of which this rank holds nothing stay in: all ranks compare tables of equal length.
    places: dict[str, int] = {}
    contents: list[Tensor] = []
    for name, held in by_name.items():
        held = sorted((span for span in held if span.numel), key=lambda span: span.start)
        places[name] = _place(held)
        content = torch.zeros((), dtype=torch.int64)
        for span in held:
            part = fingerprint(span.tensor[: span.numel])
            content = content.to(part.device) * _MIX + part
        contents.append(content)
    # One transfer for all names, not one for each.
    values = torch.stack([c.to(transport_device()) for c in contents]).tolist() if contents else []
    return {name: (places[name], value) for name, value in zip(by_name, values, strict=True)}


def _place(held: Sequence[HeldSpan]) -> int:
    if not held:
        return 0
    text = ",".join(f"{span.start}+{span.numel}" for span in held)
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True
    )


def _names_of_all(mine: list[str]) -> list[str]:
    """The names of all ranks, which nearly always are those of each."""
    digests = everyone(zlib.crc32("\n".join(mine).encode()))
    if len(set(digests)) == 1:
        return mine
    names: set[str] = set()
    for other in everyone(mine):
        names.update(other)
    return sorted(names)


def _compare(names: Sequence[str], mine: dict[str, tuple[int, int]]) -> list[Difference]:
    rows = torch.tensor([mine.get(name, (0, 0)) for name in names], dtype=torch.int64)
    rows = rows.to(transport_device())
    heard = [torch.empty_like(rows) for _ in range(ranks.world_size())]
    dist.all_gather(heard, rows)
    table = torch.stack(heard).cpu()  # ranks x names x (place, content)
    # Ranks that hold the same elements become neighbours, in the order of ranks.
    places, order = table[:, :, 0].sort(dim=0, stable=True)
    contents = table[:, :, 1].gather(0, order)
    same = (places[1:] == places[:-1]) & (places[1:] != 0)
    other = same & (contents[1:] != contents[:-1])
    found: dict[str, Difference] = {}
    for at, column in other.nonzero().tolist():
        rank, beside = order[at : at + 2, column].tolist()
        name = names[column]
        found.setdefault(name, Difference(name=name, rank=rank, other=beside))
    return list(found.values())
