"""The ways in which sharders hand parameters to an optimizer, each acted out on scratch parameters.

``Way.of`` says which way a live layout has; ``stepped`` does the same to scratch parameters: two
optimizers in the place of two ranks, each with its parts, or DTensors on the model's own mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from dist_layerlr.optim.groups import INITIAL_LR, LR, NAME, WEIGHT_DECAY, split_by_mesh
from dist_layerlr.optim.scratch import (
    Part,
    Rank,
    Scratch,
    cut_along,
    cut_flat,
    cut_stretch,
    joined,
)
from dist_layerlr.optim.segmented import MakeOptimizer, Segmented
from dist_layerlr.plan.entries import Shape
from dist_layerlr.sharders.base import Layout, ParamGroup, Slice


class Cut(Enum):
    """What an optimizer is given of each parameter."""

    WHOLE = "whole parameters"
    ROWS = "some rows or columns of each parameter"
    SHARDS = "1-D shards of each parameter"
    GROUPS = "each parameter group as one 1-D shard"
    SLICES = "slices of one 1-D shard"
    DTENSORS = "DTensors"


class Turns(Enum):
    """How DeepSpeed makes one step of the training of several steps of the optimizer."""

    GROUPS = "one group at a time"
    """Stages 1 and 2: the optimizer's ``param_groups`` hold that group alone."""
    SUB_GROUPS = "some at a time"
    """Stage 3: all groups are there, and one of them has a tensor in it."""


Placed = tuple[Any, tuple[Any, ...], int]
"""(device mesh, placements, number of dimensions) of a DTensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a layout hands parameters over."""

    cut: Cut
    dims: tuple[int, ...] = ()
    """ROWS: the dimensions that are cut."""
    turns: Turns | None = None
    placed: tuple[Placed, ...] = ()
    """DTENSORS: on which meshes."""

    @property
    def text(self) -> str:
        """For messages."""
        return self.cut.value + (f", {self.turns.value}" if self.turns else "")

    @classmethod
    def of(cls, layout: Layout, owners: Sequence[Tensor], names: int, *, segmented: bool) -> Way:
        """The way of a live layout: the same on all ranks.

        Args:
            layout: of the sharder.
            owners: what the optimizer holds, each once.
            names: number of parameters. Fewer owners: several parameters share one.
            segmented: whether the optimizer steps slices of its owners.
        """
        # Stage 0 in mixed precision has, with some optimizers, one flat copy of each group.
        if layout.name == "zero" and (layout.flat or len(owners) < names):
            cut = Cut.SLICES if segmented else Cut.GROUPS
            turns = {1: Turns.GROUPS, 2: Turns.GROUPS, 3: Turns.SUB_GROUPS}.get(layout.stage or 0)
            return cls(cut=cut, turns=turns if len(owners) > 1 else None)
        if layout.name == "fsdp1_flat":
            return cls(cut=Cut.SLICES)
        if layout.name == "fsdp1":
            return cls(cut=Cut.SHARDS)
        placed = _placed(owners)
        if not placed:
            return cls(cut=Cut.WHOLE)
        if not segmented:
            return cls(cut=Cut.DTENSORS, placed=placed)
        dims = sorted({dim for mesh, placements, _ in placed for dim in _cut(mesh, placements)})
        return cls(cut=Cut.ROWS, dims=tuple(dims)) if dims else cls(cut=Cut.WHOLE)


def _placed(owners: Iterable[Tensor]) -> tuple[Placed, ...]:
    found: dict[Placed, None] = {}
    for owner in owners:
        if isinstance(owner, DTensor):
            found[owner.device_mesh, tuple(owner.placements), owner.ndim] = None
    return tuple(found)


def _cut(mesh: Any, placements: Sequence[Any]) -> list[int]:
    """Tensor dimensions that are really cut."""
    return [p.dim for i, p in enumerate(placements) if p.is_shard() and mesh.size(i) > 1]


def shapes_on_meshes(placed: Iterable[Placed]) -> list[Shape]:
    """One shape for each kind of DTensor, such that no rank's shard is empty and some differ.

    An operation on an empty shard may fail on its rank alone, and leave the others waiting.
    """
    shapes: list[Shape] = []
    for mesh, placements, ndim in placed:
        sizes = [8, 5, 4, 2, *[2] * ndim][:ndim]
        for dim in set(_cut(mesh, placements)):
            ranks = 1
            for i, placement in enumerate(placements):
                ranks *= mesh.size(i) if placement.is_shard(dim) else 1
            sizes[dim] = 4 * ranks - 1
        shapes.append(tuple(sizes))
    return shapes


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Weights of all elements of a scratch."""

    first: Tensor
    """After the first step: some optimizers project the weights there, whatever the rate is."""
    last: Tensor


def stepped(make: MakeOptimizer, scratch: Scratch, way: Way) -> Trained:
    """Train scratch parameters in the given way.

    Raises:
        Exception: whatever the optimizer raises.
    """
    found = Trained(first=scratch.weights.clone(), last=scratch.weights.clone())
    for ranks in _ranks(scratch, way):
        for rank in ranks:
            if rank:
                _step_rank(make, scratch, rank, way, found)
    return found


def _ranks(scratch: Scratch, way: Way) -> list[list[Rank]]:
    """Sets of ranks; each set holds all parameters once."""
    if way.cut is Cut.ROWS:
        return [cut_along(scratch.parts, dim) for dim in way.dims]
    if way.cut is Cut.SHARDS:
        return [cut_flat(scratch.parts)]
    if way.cut is Cut.SLICES:
        return [cut_stretch(scratch.parts)]
    if way.cut is Cut.GROUPS:
        ranks: list[Rank] = [[], []]
        for group in range(len(scratch.groups)):
            halves = cut_stretch(part for part in scratch.parts if part.group == group)
            for rank, half in zip(ranks, halves, strict=True):
                if half:  # a group of one number lies on one rank
                    rank.append(joined(half))
        return [ranks]
    return [[list(scratch.parts)]]


def _step_rank(
    make: MakeOptimizer, scratch: Scratch, parts: Rank, way: Way, found: Trained
) -> None:
    """Train what one rank holds, and write the result into ``found``."""
    owners = _owners(scratch, parts, way)
    if way.cut is Cut.SLICES:
        optimizer: Optimizer = _segmented(make, scratch, owners)
    else:
        optimizer = make(_groups(scratch, owners))
    held = [list(group["params"]) for group in optimizer.param_groups]
    turns = [[owner] for owner in owners] if way.turns else [owners]
    for step, gradients in enumerate(scratch.gradients):
        for turn in turns:
            for part, owner in turn:
                owner.grad = _like(gradients[part.places], owner)
            active = {id(owner) for _, owner in turn}
            groups = optimizer.param_groups
            for group, params in zip(groups, held, strict=True):
                # As DeepSpeed does: what is not stepped in this turn is not in its group either.
                group["params"] = [p for p in params if id(p) in active or not way.turns]
            if way.turns is Turns.GROUPS:
                optimizer.param_groups = [group for group in groups if group["params"]]
            optimizer.step()
            optimizer.param_groups = groups
            for _, owner in turn:
                owner.grad = None
        if step in (0, len(scratch.gradients) - 1):
            _write(owners, found.last if step else found.first)


def _write(owners: Owners, into: Tensor) -> None:
    for part, owner in owners:
        value = owner.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        # A mesh of cards takes scratch tensors to its cards, also where parameters are offloaded.
        into[part.places] = whole.to(into.device)


Owners = list[tuple[Part, nn.Parameter]]


def _owners(scratch: Scratch, parts: Rank, way: Way) -> Owners:
    """The optimizer's parameters."""
    if way.cut is Cut.SLICES:
        # Sub-groups, each a flat tensor that parameters of all groups share: every other one.
        cuts = [parts[::2], parts[1::2]] if way.turns else [parts]
        parts = [joined(cut) for cut in cuts if cut]
    owners: Owners = []
    for number, part in enumerate(parts):
        value = scratch.weights[part.places].clone()
        if way.cut is Cut.DTENSORS:
            mesh, placements, _ = way.placed[number % len(way.placed)]
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
        owners.append((part, nn.Parameter(value)))
    return owners


def _like(gradient: Tensor, owner: Tensor) -> Tensor:
    if not isinstance(owner, DTensor):
        return gradient
    # Every rank has computed the whole: no rank sends its own to the others.
    return distribute_tensor(gradient, owner.device_mesh, owner.placements, src_data_rank=None)


def _groups(scratch: Scratch, owners: Owners) -> list[ParamGroup]:
    groups: list[ParamGroup] = []
    for number, spec in enumerate(scratch.groups):
        params = [owner for part, owner in owners if part.group == number]
        if params:
            group = {"params": params, LR: spec.lr, INITIAL_LR: spec.lr, NAME: spec.name}
            if spec.weight_decay is not None:
                group[WEIGHT_DECAY] = spec.weight_decay
            groups += split_by_mesh(group)
    return groups


def _segmented(make: MakeOptimizer, scratch: Scratch, owners: Owners) -> Optimizer:
    """The project's own segments on flat tensors, as under FSDP1 and ZeRO."""
    whole = {part.name: part.places.reshape(-1) for part in scratch.parts}
    slices: list[Slice] = []
    absent = dict.fromkeys(whole)
    for joint, owner in owners:
        for name, places in whole.items():
            # Places count upwards in every parameter, so what it has in the owner is one run.
            inside = (joint.places >= places[0]) & (joint.places <= places[-1])
            numel = int(inside.sum())
            if numel:
                offset = int(inside.nonzero()[0])
                start = int(joint.places[offset] - places[0])
                slices.append(
                    Slice(name=name, start=start, numel=numel, owner=owner, offset=offset)
                )
                absent.pop(name, None)
    # The plan's names must all be there, with 0 elements where this rank has nothing.
    first = owners[0][1]
    slices += [Slice(name=name, start=0, numel=0, owner=first, offset=0) for name in absent]
    return Segmented(scratch.plan, [owner for _, owner in owners], make, slices)
