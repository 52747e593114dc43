"""Which elements of the whole a DTensor's local part holds, from its placements.

Private, read in torch 2.13: ``_StridedShard`` with its ``dim`` and ``split_factor``. FSDP2 places a
parameter by it that tensor parallelism had cut along the same dimension before. torch's own
``compute_local_shape_and_global_offset`` gives the first index of each dimension only, after it has
built the list of all of them; tests/unit/sharders/test_placement.py compares both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.ranks import world_size
from dist_layerlr.sharders.ranges import Range, box_runs, count_box_runs, shard_ranges

MAX_RUNS = 1 << 22
"""Runs of one parameter on one rank. Each is an entry in a checkpoint's index: more of them than
this cost more than the tensor itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the local part of a tensor lies in the whole."""

    runs: list[Range]
    """Of the flattened whole, in the order of the local elements. Never empty: (0, 0) stands for a
    rank that holds nothing."""
    replicas: int
    """Ranks that hold each element."""


def place(name: str, tensor: Tensor, here: Tensor) -> Placed:
    """Where a parameter's local part lies.

    Args:
        name: for errors.
        tensor: a DTensor, or a plain tensor, of which every rank has a copy.
        here: its local part.

    Raises:
        PlanMismatch: a placement that is no run of elements, or that does not describe ``here``.
    """
    if not isinstance(tensor, DTensor):
        return Placed(runs=[(0, tensor.numel())], replicas=world_size())
    mesh = tensor.device_mesh
    replicas = _copies_beside(mesh)
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    coordinate = mesh.get_coordinate()
    for mesh_dim, placement in enumerate(tensor.placements):
        ranks = mesh.size(mesh_dim)
        if placement.is_replicate():
            replicas *= ranks
        elif coordinate is not None:
            dim = _cut_dimension(name, tensor, placement)
            parts = int(getattr(placement, "split_factor", 1))
            cuts.setdefault(dim, []).append((ranks, coordinate[mesh_dim], parts))
    if coordinate is None:
        return Placed(runs=[(0, 0)], replicas=replicas)
    held = [shard_ranges(size, cuts.get(dim, ())) for dim, size in enumerate(tensor.shape)]
    _check_size(name, tensor, here, held)
    return Placed(runs=box_runs(tensor.shape, held) or [(0, 0)], replicas=replicas)


def _copies_beside(mesh: Any) -> int:
    """Copies on ranks outside the mesh.

    A parameter that tensor parallelism leaves alone is sharded on the data parallel ranks of each
    of its ranks: as many meshes hold it as the job has room for.
    """
    return max(-(-world_size() // int(mesh.size())), 1)


def _cut_dimension(name: str, tensor: DTensor, placement: Any) -> int:
    dim = getattr(placement, "dim", None)
    if placement.is_partial() or not isinstance(dim, int):
        raise PlanMismatch(
            f"{name} is placed as {tensor.placements}: a parameter that is {placement} has its"
            " value on no rank. Place parameters as Shard or Replicate."
        )
    return dim


def _check_size(name: str, tensor: DTensor, here: Tensor, held: list[list[Range]]) -> None:
    shape = tuple(sum(count for _, count in taken) for taken in held)
    # An empty part may be kept in another shape.
    if shape != tuple(here.shape) and (0 not in shape or here.numel()):
        raise PlanMismatch(
            f"{name} {tuple(tensor.shape)} is placed as {tensor.placements}, which gives this rank"
            f" {shape}, but it holds {tuple(here.shape)}: torch (2.13 was read) cannot describe"
            " such an uneven cut. Make the dimension divisible by the ranks that share it, or shard"
            " it along another one."
        )
    runs = count_box_runs(tensor.shape, held)
    if runs > MAX_RUNS:
        raise PlanMismatch(
            f"{name} {tuple(tensor.shape)} is placed as {tensor.placements}: this rank holds it in"
            f" {runs:,} separate runs of elements, at most {MAX_RUNS:,} can be saved or loaded."
            " Shard it along an earlier dimension."
        )
