"""Every element of every planned name is stepped, as often as ranks hold a copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
import torch.distributed as dist

from dist_layerlr.optim.readback import LiveParam
from dist_layerlr.plan.entries import Plan
from dist_layerlr.ranks import Problem, in_group, transport_device
from dist_layerlr.sharders import Pieces

_MODULUS = 1 << 40
"""Sums of 2**20 ranks stay below the largest int64."""
Sums = tuple[int, int, int]
"""Of a set of elements: how many, their positions summed, the squares of these summed."""


def element_problems(
    plan: Plan, found: Pieces, live: Mapping[str, LiveParam], anyhow: Set[str]
) -> list[Problem]:
    """Add up which elements all ranks step, and compare with the true sizes. Collective.

    Sums of positions tell a shard that two ranks step from one that nobody does, which a number of
    elements does not.

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
    mine = dict.fromkeys(names, (0, 0, 0))
    for piece in found.pieces:
        if piece.numel and piece.name in mine:
            more = _sums(piece.start, piece.numel)
            before = mine[piece.name]
            mine[piece.name] = (before[0] + more[0], before[1] + more[1], before[2] + more[2])
    rows = [(count, first % _MODULUS, second % _MODULUS) for count, first, second in mine.values()]
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
    if in_group():
        table = table.to(transport_device())
        dist.all_reduce(table)
    problems: list[Problem] = []
    for name, (count, first, second) in zip(names, table.tolist(), strict=True):
        numel = plan.entries[name].numel
        copies = live[name].replicas
        if name in anyhow:
            copies = max(count // numel, 1) if numel else copies
        if count != numel * copies:
            text = f"{name}: {count} elements stepped over all ranks, {numel * copies} expected"
            problems.append(("elements", text))
            continue
        _, *wanted = _sums(0, numel)
        if any((copies * w - f) % _MODULUS for w, f in zip(wanted, (first, second), strict=True)):
            text = f"{name}: some elements are stepped by more ranks than others"
            problems.append(("elements", text))
    return problems


def _sums(start: int, numel: int) -> Sums:
    """Of the positions [start, start + numel)."""
    last = numel - 1
    first = numel * start + numel * last // 2
    squares = last * numel * (2 * numel - 1) // 6
    return numel, first, numel * start * start + start * numel * last + squares
