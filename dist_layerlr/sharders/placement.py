"""Which elements of the whole a DTensor's local part holds, from its placements.

Private, read in torch 2.13: ``_StridedShard`` with its ``dim`` and ``split_factor``. FSDP2 places a
parameter by it that tensor parallelism had cut along the same dimension before. torch's own
``compute_local_shape_and_global_offset`` gives the first index of each dimension only, after it has
built the list of all of them; tests/unit/sharders/test_placement.py compares both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from dist_layerlr.errors import PlanMismatch
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


def place(name: str, tensor: Tensor, here: Tensor, ranks: int) -> Placed:
    """Where a parameter's local part lies.

    Args:
        name: for errors.
        tensor: a DTensor, or a plain tensor, of which every rank has a copy.
        here: its local part.
        ranks: of the job.

    Raises:
        PlanMismatch: a placement that is no run of elements, or that does not describe ``here``.
    """
    if not isinstance(tensor, DTensor):
        return Placed(runs=[(0, tensor.numel())], replicas=ranks)
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    # None: this rank has no part in the mesh.
    at = None if coordinate is None else tuple(coordinate)
    box = _box(mesh, placements, tensor.shape, at, ranks)
    if box.unreadable is not None:
        raise PlanMismatch(
            f"{name} is placed as {placements}: a parameter that is {box.unreadable} has its value"
            " on no rank. Place parameters as Shard or Replicate."
        )
    if at is not None and box.shape != here.shape and (0 not in box.shape or here.numel()):
        raise PlanMismatch(
            f"{name} {tuple(tensor.shape)} is placed as {placements}, which gives this rank"
            f" {box.shape}, but it holds {tuple(here.shape)}: torch (2.13 was read) cannot describe"
            " such an uneven cut. Make the dimension divisible by the ranks that share it, or shard"
            " it along another one."
        )
    if box.count > MAX_RUNS:
        raise PlanMismatch(
            f"{name} {tuple(tensor.shape)} is placed as {placements}: this rank holds it in"
            f" {box.count:,} separate runs of elements, at most {MAX_RUNS:,} can be saved or"
            " loaded. Shard it along an earlier dimension."
        )
    if box.count == 1:
        return box.whole
    return Placed(runs=box_runs(tensor.shape, box.held) or [(0, 0)], replicas=box.whole.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """What a rank holds under some placements, whichever parameter it is."""

    held: tuple[list[Range], ...]
    """For each dimension the runs of indices."""
    shape: tuple[int, ...]
    """Of the local part."""
    count: int
    """Runs of the flattened whole, at most."""
    whole: Placed
    """The answer itself where it is one run."""
    unreadable: str | None = None
    """A placement that is no part of the whole."""


# Thousands of parameters of a model share a few placements and shapes.
@lru_cache(maxsize=4096)
def _box(
    mesh: DeviceMesh,
    placements: tuple[Placement, ...],
    shape: tuple[int, ...],
    coordinate: tuple[int, ...] | None,
    ranks: int,
) -> _Box:
    replicas = _copies_beside(mesh, ranks)
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    unreadable = None
    for mesh_dim, placement in enumerate(placements):
        dim = getattr(placement, "dim", None)
        size = mesh.size(mesh_dim)
        if placement.is_replicate():
            replicas *= size
        elif placement.is_partial() or not isinstance(dim, int):
            unreadable = str(placement)
        elif coordinate is not None:
            # A plain Shard cuts one part: all that is left of the dimension.
            parts = int(getattr(placement, "split_factor", 1))
            cuts.setdefault(dim, []).append((size, coordinate[mesh_dim], parts))
    held = tuple(shard_ranges(size, cuts.get(dim, ())) for dim, size in enumerate(shape))
    # A rank outside the mesh holds nothing.
    count = 0 if coordinate is None else count_box_runs(shape, held)
    runs = box_runs(shape, held) if count == 1 else []
    return _Box(
        held=held,
        shape=tuple(sum(length for _, length in taken) for taken in held),
        count=max(count, 1),
        whole=Placed(runs=runs or [(0, 0)], replicas=replicas),
        unreadable=unreadable,
    )


def _copies_beside(mesh: DeviceMesh, ranks: int) -> int:
    """Copies on ranks outside the mesh.

    A parameter that tensor parallelism leaves alone is sharded on the data parallel ranks of each
    of its ranks: as many meshes hold it as the job has room for.
    """
    return max(-(-ranks // mesh.size()), 1)
