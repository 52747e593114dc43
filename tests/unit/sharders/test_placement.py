"""Runs of elements from placements, against what torch itself cuts and says.

If a test here fails after torch changed, ``dist_layerlr/sharders/placement.py`` reads placements
that mean something else now.
"""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dist_layerlr.sharders.placement import MAX_RUNS
from dist_layerlr.sharders.ranges import box_runs, count_box_runs, dim0_range, shard_ranges

SIZES = (1, 2, 3, 5, 8, 9, 16)
CUTS = {
    "rows": (Shard(0),),
    "rows twice": (Shard(0), Shard(0)),
    "tensor parallel rows, then FSDP2": (_StridedShard(0, split_factor=2), Shard(0)),
    "rows, then a strided cut": (Shard(0), _StridedShard(0, split_factor=2)),
    "columns": (Shard(1),),
    "rows and columns": (Shard(0), Shard(1)),
    "the last of three": (Shard(2), Shard(0)),
}


def cut_by_torch(numbered: torch.Tensor, placements: Any, mesh: Any, at: Any) -> torch.Tensor:
    """What torch's own placements leave of a tensor on the rank at these coordinates."""
    for placement, ranks, rank in zip(placements, mesh, at, strict=True):
        parts, _ = placement._split_tensor(numbered, ranks, with_padding=False)
        numbered = parts[rank]
    return numbered


def runs_of(shape: Any, placements: Any, mesh: Any, at: Any) -> list[tuple[int, int]]:
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for placement, ranks, rank in zip(placements, mesh, at, strict=True):
        parts = getattr(placement, "split_factor", 1)
        cuts.setdefault(placement.dim, []).append((ranks, rank, parts))
    held = [shard_ranges(size, cuts.get(dim, ())) for dim, size in enumerate(shape)]
    runs = box_runs(shape, held)
    assert len(runs) <= count_box_runs(shape, held)
    return runs


@pytest.mark.parametrize("cut", sorted(CUTS))
def test_runs_are_the_elements_that_torch_leaves_on_each_rank(cut: str) -> None:
    placements = CUTS[cut]
    for rows, ranks in itertools.product(SIZES, (1, 2, 3)):
        shape = (rows, 4, 3)
        mesh = (ranks, 2)[: len(placements)]
        numbered = torch.arange(prod(shape)).reshape(shape)
        for at in itertools.product(*map(range, mesh)):
            wanted = cut_by_torch(numbered, placements, mesh, at)
            runs = runs_of(shape, placements, mesh, at)
            held = [e for start, count in runs for e in range(start, start + count)]
            assert held == wanted.flatten().tolist(), (shape, mesh, at)


@pytest.mark.parametrize("cut", sorted(CUTS))
def test_shape_and_offset_are_those_of_torchs_own_helper(cut: str) -> None:
    placements = CUTS[cut]
    for rows, ranks in itertools.product(SIZES, (1, 2, 3)):
        shape = (rows, 4, 3)
        mesh = (ranks, 2)[: len(placements)]
        for at in itertools.product(*map(range, mesh)):
            sizes, offset = _compute_local_shape_and_global_offset(
                shape, mesh, list(at), placements
            )
            runs = runs_of(shape, placements, mesh, at)
            assert sum(count for _, count in runs) == prod(sizes)
            if runs:
                first = (offset[0] * shape[1] + offset[1]) * shape[2] + offset[2]
                assert runs[0][0] == first


def test_a_shard_of_rows_is_one_run_and_touching_ones_are_joined() -> None:
    for rows, ranks in itertools.product(SIZES, (1, 2, 3, 4)):
        for rank in range(ranks):
            held = [shard_ranges(rows, [(ranks, rank, 1)]), [(0, 7)]]
            start, count = dim0_range((rows, 7), ranks, rank)
            assert box_runs((rows, 7), held) == ([(start, count)] if count else [])
    assert shard_ranges(8, [(1, 0, 4)]) == [(0, 8)]
    assert box_runs((), []) == [(0, 1)]
    assert box_runs((4, 2, 3), [[(1, 2)], [(0, 2)], [(0, 3)]]) == [(6, 12)]


def test_the_number_of_runs_is_known_without_making_them() -> None:
    rows = 2 * MAX_RUNS
    assert count_box_runs((rows, 8), [[(0, rows)], [(0, 4)]]) == rows
    assert count_box_runs((rows, 8), [[(5, 9)], [(0, 8)]]) == 1
