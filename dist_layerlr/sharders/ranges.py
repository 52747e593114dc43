"""Which elements of which parameter a rank holds, from names and shapes alone.

Pure: no process group needed.

A range is (start, count) in elements of the flattened, unsharded parameter. The adapters use these
functions on live shards; the simulation uses them for jobs of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

Range = tuple[int, int]
"""(first element, number of elements) of a flattened parameter."""


def dim0_range(shape: Sequence[int], world_size: int, rank: int) -> Range:
    """FSDP2: dimension 0 in chunks of ``ceil(rows / world_size)`` rows, as ``torch.chunk`` cuts it.

    DTensor's ``Shard(0)`` follows that rule; the last chunks are smaller or empty.
    """
    rows, width = shape[0], prod(shape[1:])
    chunk = -(-rows // world_size)
    first = min(rank * chunk, rows)
    return first * width, (min(first + chunk, rows) - first) * width


def zero3_range(numel: int, world_size: int, rank: int) -> Range:
    """ZeRO-3: every parameter alone, flattened, in partitions of ``ceil(numel / world_size)``.

    Padding not counted.
    """
    partition = zero3_partition(numel, world_size)
    first = min(rank * partition, numel)
    return first, min(first + partition, numel) - first


def zero3_partition(numel: int, world_size: int) -> int:
    """Elements of a ZeRO-3 partition, padding included."""
    return -(-numel // world_size)


def flat_ranges(
    numels: Sequence[int], world_size: int, rank: int, *, align: int = 1
) -> list[Range]:
    """Parameters laid end to end and cut evenly: FSDP1's flat parameter, or a ZeRO-1 and -2 group.

    Args:
        numels: sizes in flattening order.
        world_size: ranks that share them.
        rank: whose ranges.
        align: the total is padded to a multiple of ``align * world_size``.

    Returns:
        One range per parameter, (0, 0) where the rank holds nothing of it.
    """
    step = align * world_size
    chunk = -(-sum(numels) // step) * align
    low, high = rank * chunk, (rank + 1) * chunk
    ranges: list[Range] = []
    offset = 0
    for numel in numels:
        first, last = max(low, offset), min(high, offset + numel)
        ranges.append((first - offset, last - first) if last > first else (0, 0))
        offset += numel
    return ranges


def shard_ranges(size: int, cuts: Sequence[tuple[int, int, int]]) -> list[Range]:
    """What a rank holds of one dimension that DTensor placements cut, one after the other.

    ``Shard`` cuts into chunks of ``ceil(size / count)``, as ``torch.chunk`` does. ``_StridedShard``
    first cuts into ``parts``, as another mesh dimension did before it, and takes its chunk of each
    part.

    Args:
        size: of the dimension.
        cuts: (ranks that share what is left, this rank among them, parts; 1 for ``Shard``).

    Returns:
        Runs of indices, in order; those that touch are one.
    """
    held = [(0, size)]
    for count, rank, parts in cuts:
        total = sum(numel for _, numel in held)
        taken: list[Range] = []
        for part in range(parts):
            first, numel = _chunk(total, parts, part)
            start, length = _chunk(numel, count, rank)
            taken += _within(held, first + start, length)
        held = _joined(taken)
    return _joined(held)


def box_runs(shape: Sequence[int], held: Sequence[Sequence[Range]]) -> list[Range]:
    """Runs of the flattened whole that a box of it covers, in the order of the box's own elements.

    One run where the box spans all dimensions behind its first, else one for each of its rows.

    Args:
        shape: of the whole.
        held: for each dimension the runs of indices inside the box, as ``shard_ranges`` gives them.
    """
    runs: list[Range] = [(0, 1)]
    width = 1
    for size, taken in zip(reversed(shape), reversed(held), strict=True):
        # While all later dimensions are whole, what is taken of this one stays together.
        if runs == [(0, width)]:
            runs = [(start * width, count * width) for start, count in taken]
        else:
            rows = (row for start, count in taken for row in range(start, start + count))
            runs = [(row * width + start, numel) for row in rows for start, numel in runs]
        width *= size
    return [run for run in runs if run[1]]


def count_box_runs(shape: Sequence[int], held: Sequence[Sequence[Range]]) -> int:
    """How many runs ``box_runs`` gives, without making them; at most."""
    runs, whole = 1, True
    for size, taken in zip(reversed(shape), reversed(held), strict=True):
        runs = len(taken) if whole else runs * sum(count for _, count in taken)
        whole = whole and list(taken) == [(0, size)]
    return runs


def _chunk(size: int, count: int, rank: int) -> Range:
    """(first, length) of a chunk as ``torch.chunk`` cuts; the last ones may be empty."""
    chunk = -(-size // count)
    first = min(rank * chunk, size)
    return first, min(first + chunk, size) - first


def _within(held: Sequence[Range], first: int, numel: int) -> list[Range]:
    """Positions [first, first + numel) of the indices that ``held`` lists, as runs of indices."""
    taken: list[Range] = []
    before = 0
    for start, count in held:
        low, high = max(first, before), min(first + numel, before + count)
        if high > low:
            taken.append((start + low - before, high - low))
        before += count
    return taken


def _joined(runs: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, count in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((start, count))
    return joined
