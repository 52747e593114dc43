"""Scratch parameters on which an optimizer is tried, whole and in parts.

All scratch parameters together are one vector of elements. A part is a tensor of positions in that
vector, of the shape in which an optimizer is given it: a matrix, some of its rows, or a run of
elements that several matrices share. Weights and gradients of a part are looked up by position, so
the same elements meet the same gradients however they are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from dist_layerlr.plan.config import Config
from dist_layerlr.plan.entries import GroupSpec, Plan, PlanEntry, Shape

RATES = (1e-3, 5e-3)
"""Each kind of group is there twice, at these two rates."""
STEPS = 32
"""Some optimizers precondition, or move at all, from their tenth or twenty-fifth step on."""
FEW = 5
"""Steps of the larger scratch parameters, and of other precisions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What an optimizer is given of a scratch parameter."""

    name: str
    group: int
    """Position in ``Scratch.groups``."""
    places: Tensor
    """int64, of the part's shape: positions in the vector of all elements."""

    @property
    def flat(self) -> Part:
        """The same elements in one dimension."""
        return replace(self, places=self.places.reshape(-1))


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """Whole parameters in their groups, with weights and gradients."""

    groups: tuple[GroupSpec, ...]
    parts: tuple[Part, ...]
    """The whole parameters. Groups 0 and 1, 2 and 3 ... hold equal ones: they differ in rate."""
    weights: Tensor
    """Of all elements, at the start."""
    gradients: Tensor
    """(steps, elements)."""

    @property
    def plan(self) -> Plan:
        """A plan of the whole parameters, for an optimizer that needs one."""
        entries: dict[str, PlanEntry] = {}
        for part in self.parts:
            spec = self.groups[part.group]
            entries[part.name] = _entry(part.name, tuple(part.places.shape), spec)
        plan = Plan(entries=entries, config=Config())
        # The plan would name groups after components and blocks; a user's optimizer may ask for
        # the names that it was given for the real parameters.
        vars(plan)["groups"] = self.groups
        return plan


def make_scratch(
    kinds: Sequence[tuple[str, float | None]],
    shapes: Iterable[Shape],
    *,
    steps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Scratch:
    """Scratch parameters of some shapes, one of each shape in every group.

    Args:
        kinds: (name, weight decay) of each kind of group.
        shapes: of the parameters.
        steps: number of gradients.
        dtype: of weights and gradients.
        device: where they lie.
    """
    shapes = list(shapes)
    generator = torch.Generator().manual_seed(0)  # ranks must try the same thing
    weights = [torch.randn(shape, generator=generator) / 2 for shape in shapes]
    gradients = [_gradients(weight, steps, generator) for weight in weights]
    groups: list[GroupSpec] = []
    parts: list[Part] = []
    begin = 0
    for name, weight_decay in kinds:
        for rate in RATES:
            names: list[str] = []
            for shape in shapes:
                numel = prod(shape)
                places = torch.arange(begin, begin + numel).reshape(shape)
                names.append(f"scratch.{len(parts)}")
                parts.append(Part(name=names[-1], group=len(groups), places=places.to(device)))
                begin += numel
            groups.append(
                GroupSpec(name=name, lr=rate, weight_decay=weight_decay, names=tuple(names))
            )
    return Scratch(
        groups=tuple(groups),
        parts=tuple(parts),
        weights=torch.cat([w.reshape(-1) for w in weights] * len(groups)).to(device, dtype),
        gradients=torch.cat([g.reshape(steps, -1) for g in gradients] * len(groups), dim=1).to(
            device, dtype
        ),
    )


def _gradients(weight: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """One gradient per step, as unlike one another as those of a training may be.

    Optimizers that mix elements often do so in some regimes only: they clip large updates, or
    project a gradient that is at right angles to its weight.
    """
    # Rows differ by two orders of magnitude, and so do steps: halves of a tensor then differ in
    # every mean, norm and maximum.
    rows = (steps, *weight.shape[:1], *[1] * max(0, weight.ndim - 1))
    scale = 10.0 ** (torch.rand(rows, generator=generator) * 2 - 1)
    sizes = torch.tensor([0.3, 3.0, 1.0, 0.1, 1.0]).repeat(steps)[:steps]
    found = torch.randn((steps, *weight.shape), generator=generator) * scale
    found *= sizes.reshape(steps, *[1] * weight.ndim)
    if weight.ndim > 1:
        found[1] -= weight * ((found[1] * weight).sum() / weight.square().sum())
        inner = tuple(range(1, weight.ndim))
        by_row = (found[2] * weight).sum(inner, True) / weight.square().sum(inner, True)
        found[2] -= weight * by_row
    return found


def _entry(name: str, shape: Shape, spec: GroupSpec) -> PlanEntry:
    return PlanEntry(
        name=name,
        shape=shape,
        component="default",
        rule="scratch",
        stack=None,
        block=None,
        blocks=None,
        panel=None,
        base_lr=spec.lr,
        factor=1.0,
        depth=None,
        multiplier=1.0,
        lora_plus=1.0,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        region=None,
    )


Rank = list[Part]
"""What one rank holds."""


def cut_along(parts: Iterable[Part], dim: int) -> list[Rank]:
    """Two ranks that hold the first and the last rows (or columns) of each parameter."""
    ranks: list[Rank] = [[], []]
    for part in parts:
        if part.places.ndim <= dim:
            ranks[0].append(part)
            continue
        # At no multiple of a power of two: state that is kept in blocks is cut inside a block.
        first = 3 * part.places.shape[dim] // 7
        halves = part.places.tensor_split([first], dim)
        for rank, places in zip(ranks, halves, strict=True):
            rank.append(replace(part, places=places.contiguous()))
    return ranks


def cut_flat(parts: Iterable[Part]) -> list[Rank]:
    """Two ranks that hold the first and the last elements of each parameter, in one dimension."""
    return cut_along((part.flat for part in parts), 0)


def cut_stretch(parts: Iterable[Part]) -> list[Rank]:
    """Parameters laid end to end and cut in the middle of one of them: what two ranks hold."""
    parts = [part.flat for part in parts]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.places.numel())
    middle = 3 * ends[-1] // 7
    ranks: list[Rank] = [[], []]
    for part, (start, end) in zip(parts, pairwise(ends), strict=True):
        here = max(0, min(middle, end) - start)
        for rank, places in zip(ranks, part.places.tensor_split([here]), strict=True):
            if places.numel():
                rank.append(replace(part, places=places))
    return ranks


def joined(parts: Sequence[Part]) -> Part:
    """Flat parts as one, laid end to end."""
    return replace(parts[0], places=torch.cat([part.places.reshape(-1) for part in parts]))
