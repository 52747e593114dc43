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
