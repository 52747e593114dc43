"""Every element of every planned name is stepped, as often as ranks hold a copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import lru_cache

import torch
import torch.distributed as dist

from dist_layerlr.optim.readback import LiveParam
from dist_layerlr.plan.entries import Plan
from dist_layerlr.ranks import Problem, in_group, transport_device
from dist_layerlr.sharders import Pieces

_BITS = 40
"""Of the sums: those of 2**20 ranks stay below the largest int64."""
_MIX = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio, Knuth's multiplier of a hash."""


def element_problems(
    plan: Plan, found: Pieces, live: Mapping[str, LiveParam], anyhow: Set[str]
) -> list[Problem]:
    """Add up which elements all ranks step, and compare with the true sizes. Collective.

    A shard that two ranks step in place of one that nobody does has the right number of elements.
    Therefore a number for each end of a span is added at its start and subtracted at its end, 0 at
    the ends of the whole: where spans join, they cancel, and nothing is left.

    Args:
        plan: of the model.
        found: what this rank steps.
        live: the same by name.
        anyhow: names of which the sharder does not know how many ranks hold a copy; it must be the
            same number for all elements.

    Returns:
        Problems; the same on all ranks.
    """
    names = sorted(plan.entries)
    row = {name: number for number, name in enumerate(names)}
    sizes = [plan.entries[name].numel for name in names]
    counts, ends = [0] * len(names), [0] * len(names)
    for piece in found.pieces:
        at = row.get(piece.name)
        if at is not None and piece.numel:
            counts[at] += piece.numel
            # Most pieces are whole parameters: these have nothing to mark.
            if piece.start or piece.numel != sizes[at]:
                ends[at] += _mark(piece.start, sizes[at])
                ends[at] -= _mark(piece.start + piece.numel, sizes[at])
    # A rank's own sum may be of many spans; that of all ranks must fit in int64.
    table = torch.tensor([counts, [end % (1 << _BITS) for end in ends]], dtype=torch.int64)
    if in_group():
        table = table.to(transport_device())
        dist.all_reduce(table)
    problems: list[Problem] = []
    for name, numel, count, end in zip(names, sizes, *table.tolist(), strict=True):
        copies = live[name].replicas
        if name in anyhow and numel:
            copies = max(count // numel, 1)
        if count != numel * copies:
            text = f"{name}: {count} elements stepped over all ranks, {numel * copies} expected"
            problems.append(("elements", text))
        elif end % (1 << _BITS):
            text = f"{name}: some elements are stepped by more ranks than others"
            problems.append(("elements", text))
    return problems


@lru_cache(maxsize=1 << 16)  # sizes recur
def _mark(position: int, size: int) -> int:
    """A number for a position, such that no two sets of few positions have equal sums.

    0 where the whole, of ``size`` elements, begins and ends.
    """
    if position in (0, size):
        return 0
    mixed = (position + 1) * _MIX & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 29) * _MIX & 0xFFFFFFFFFFFFFFFF
    return mixed >> (64 - _BITS)
