"""An outer tensor of a segmented optimizer, and the views of it that the inner optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.fused import STEP
from dist_layerlr.sharders.base import Slice, local, local_gradient

State = dict[Any, dict[str, Any]]
"""``optimizer.state``: {tensor: {key: value}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbouring slices of one owner that share all settings."""

    owner: Tensor
    offset: int
    numel: int
    names: tuple[str, ...]


@dataclass(slots=True)
class OwnerViews:
    """One outer tensor (the owner), cut at the ends of its runs; one view per run.

    A view shares the owner's storage. It exists as long as the optimizer is bound; its ``grad`` is
    set for the length of one step only, so that the sharder may free gradients when it likes.
    """

    runs: Sequence[Run]
    may_share_state: bool
    """Whether the owner may be stepped as it is. False under ZeRO-3: DeepSpeed steps one sub-group
    at a time, and the inner optimizer must not see the gradients of the other sub-groups."""
    owner: Tensor = field(init=False)
    shares_state: bool = field(init=False)
    """True if the owner is its own and only view; outer and inner optimizer then use one state
    entry, and nothing has to be copied between them."""
    views: list[Tensor] = field(init=False)
    sizes: list[int] = field(init=False)
    """Sizes of all parts of the flattened local owner, in order. Parts that are no view are gaps:
    padding and frozen parameters."""
    used: list[int] = field(init=False)
    """Positions in ``sizes`` of the parts that are views."""
    may_start_apart: bool = False
    """Whether names may start at different steps (a plan with timings)."""
    apart: bool = field(init=False)
    """True if each view counts its own steps: the owner's ``step`` then has one element for each
    view, and what has not been stepped has no state in the inner optimizer."""
    plain_counters: bool = False
    """Whether the inner optimizer counts in plain numbers, as DeepSpeed's do."""
    share_counters: bool = False
    """Whether all views may count steps in one tensor: the fused call advances it once a step."""
    keys_of: Sequence[Callable[[str], bool]] | None = None
    """For each view, which keys of the state are its optimizer's; None: one optimizer steps all."""
    published: dict[str, Any] = field(default_factory=dict)
    """The state entry as this class left it on the owner. Whoever loads a checkpoint replaces
    entries; comparing by identity is how a load is noticed."""

    def __post_init__(self) -> None:
        self.owner = self.runs[0].owner
        here = local(self.owner).detach()
        self.sizes, self.used = _part_sizes(self.runs, here.numel())
        # A DTensor is never stepped as it is: each call on it pays for dispatch, one on its local
        # shard does not.
        whole = len(self.sizes) == 1 and not isinstance(self.owner, DTensor)
        self.shares_state = self.may_share_state and whole
        self.apart = self.may_start_apart and len(self.used) > 1
        if self.shares_state:
            self.views = [self.owner]
        else:
            self.views = [nn.Parameter(cut) for cut in self.cut(here)]

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """The views' parts of a local tensor laid out as the owner."""
        if len(self.sizes) == 1:
            return (tensor,)
        cuts = tensor.view(-1).split_with_sizes(self.sizes)
        return [cuts[i] for i in self.used]

    def prepare(self, inner: State, outer: State) -> None:
        """Point the views at the live storage, the live gradient, and the live state."""
        if self.shares_state:
            if self.owner in outer:
                inner[self.owner] = outer[self.owner]
            return
        tensor = local(self.owner)
        first = tensor.data_ptr() + self.runs[0].offset * tensor.element_size()
        if self.views[0].data_ptr() != first:
            # The sharder has moved its storage (FSDP1 after a gather, an offload): follow it.
            for view, cut in zip(self.views, self.cut(tensor.detach()), strict=True):
                view.data = cut
        gradients = self.cut(local_gradient(self.owner))
        for view, gradient in zip(self.views, gradients, strict=True):
            view.grad = gradient
        held = outer.get(self.owner, {})
        if self._was_replaced(held):
            self._adopt(inner, held)

    def _was_replaced(self, held: dict[str, Any]) -> bool:
        """Whether a load, or the very first step, made the owner's state other than published."""
        if len(held) != len(self.published):
            return True
        return any(held.get(key) is not value for key, value in self.published.items())

    def publish(self, inner: State, outer: State) -> None:
        """Let the state on the owner be what the step left.

        Raises:
            ConfigError: the inner optimizer keeps state that fits neither a slice nor a scalar.
        """
        if self.shares_state:
            outer[self.owner] = inner[self.owner]
            return
        for view in self.views:
            view.grad = None  # The gradient belongs to the owner; a second reference would keep it.
        held = outer[self.owner]
        if self.apart:
            self._publish_apart(inner, held)
            return
        first = self._entries(inner)
        if not self.published:
            # The first step has just created the views' state. It is laid out as the owner once;
            # from then on the views' state are slices of it, and a step changes both.
            for key, (view, value) in first.items():
                held[key] = self._first_state(inner, key, view, value)
            self._adopt(inner, held)
        for key, (view, value) in first.items():
            # A plain number, or a tensor that the optimizer replaces at every step, is no view.
            if not _elementwise(value, view) and held[key] is not value:
                held[key] = self.published[key] = value

    def _publish_apart(self, inner: State, held: dict[str, Any]) -> None:
        """As ``publish``, where a view has state from its own first step on."""
        for number, view in enumerate(self.views):
            state = inner.get(view, {})
            for key, value in state.items():
                if key == STEP:
                    slot = self._counters(held, value)[number]
                    # Counters are replaced where each view must have one of its own (fused.py).
                    if not isinstance(value, Tensor) or value.data_ptr() != slot.data_ptr():
                        slot.fill_(float(value))
                    if not self.plain_counters:
                        state[key] = slot
                elif _elementwise(value, view):
                    if key not in held:
                        held[key] = torch.zeros_like(self.owner.detach(), dtype=value.dtype)
                    part = self.cut(local(held[key]))[number]
                    # The view has made it in this very step, its first; from now on it is a slice.
                    if value.data_ptr() != part.data_ptr():
                        part.copy_(value)
                        state[key] = part
                else:
                    held[key] = self._first_state(inner, key, view, value)
        self.published = dict(held)

    def _counters(self, held: dict[str, Any], like: Any) -> Tensor:
        """The owner's step counters, one for each view; 0 for what has not been stepped."""
        if STEP not in held:
            device = like.device if isinstance(like, Tensor) else "cpu"
            held[STEP] = torch.zeros(len(self.views), dtype=torch.float32, device=device)
        counters: Tensor = held[STEP]
        return counters

    def counter_at(self, offset: int, value: Any) -> Any:
        """Of the owner's step counter, the one that counts for the element at ``offset``."""
        if not self.apart or not isinstance(value, Tensor) or value.ndim == 0:
            return value
        for run, counter in zip(self.runs, value, strict=True):
            if run.offset <= offset < run.offset + run.numel:
                return counter
        raise ValueError(f"no name begins at element {offset}")

    def counters(self, at: Mapping[int, float], like: Any) -> Tensor:
        """As ``counters_of_runs``, of the runs of this owner, on the device of ``like``."""
        device = like.device if isinstance(like, Tensor) else "cpu"
        return torch.tensor(counters_of_runs(self.runs, at), dtype=torch.float32, device=device)

    def recount(self, at: Mapping[int, float], held: dict[str, Any]) -> None:
        """Lay the step counters of the owner's state out as these views, which were cut anew.

        Args:
            at: {offset of a piece in the owner: how often it was stepped}.
            held: the owner's state, whose counters are laid out by the views before.
        """
        like = held.get(STEP)
        if self.apart and like is not None:
            held[STEP] = self.counters(at, like)
        elif isinstance(like, Tensor) and like.ndim:
            (counted,) = self.counters(at, like).unbind()
            held[STEP] = int(counted) if self.plain_counters else counted.clone()

    def _entries(self, inner: State) -> dict[str, tuple[Tensor, Any]]:
        """{key: (the first view that has it, its value)}."""
        if self.keys_of is None:
            view = self.views[0]
            return {key: (view, value) for key, value in inner.get(view, {}).items()}
        found: dict[str, tuple[Tensor, Any]] = {}
        for view, is_own in zip(self.views, self.keys_of, strict=True):
            for key, value in inner.get(view, {}).items():
                if key not in found and is_own(key):
                    found[key] = view, value
        return found

    def _first_state(self, inner: State, key: str, view: Tensor, value: Any) -> Any:
        if _elementwise(value, view):
            return self._laid_out(inner, key)
        if len(self.views) > 1 and isinstance(value, Tensor) and value.ndim:
            raise ConfigError(
                f"Invalid optimizer for slices of a flat tensor: its state {key!r}"
                f" {tuple(value.shape)} is neither a scalar nor as long as its slice"
                f" ({view.numel()}). Use AdamW."
            )
        return value

    def _laid_out(self, inner: State, key: str) -> Tensor:
        """The views' state as one tensor, sharded like the owner."""
        # Where optimizers share a flat tensor, some views have no such state: zeros hold the place.
        parts: list[Tensor | None] = [inner.get(view, {}).get(key) for view in self.views]
        whole = next(part for part in parts if part is not None)
        if len(self.sizes) > 1:
            whole = torch.zeros_like(local(self.owner).detach(), dtype=whole.dtype)
            for part, cut in zip(parts, self.cut(whole), strict=True):
                if part is not None:
                    cut.copy_(part)
        if not isinstance(self.owner, DTensor):
            return whole
        mesh, placements = self.owner.device_mesh, self.owner.placements
        return DTensor.from_local(
            whole,
            mesh,
            placements,
            run_check=False,
            shape=self.owner.shape,
            stride=self.owner.stride(),
        )

    def _adopt(self, inner: State, held: dict[str, Any]) -> None:
        """Make the inner state views of the outer state: after the first step, and after a load."""
        for view in self.views:
            inner[view] = {}
        if self.apart and isinstance(held.get(STEP), Tensor) and held[STEP].ndim == 0:
            # A counter of another layout or plan, which holds for all.
            held[STEP] = held[STEP].repeat(len(self.views))
        parts: Sequence[Any]
        for key, value in held.items():
            if self.apart and key == STEP and isinstance(value, Tensor):
                counted = value.tolist()
                parts = list(map(int, counted)) if self.plain_counters else list(value.unbind())
            elif _elementwise(value, self.owner):
                parts = self.cut(local(value))
            else:
                # Torch counts up each view's own counter, so each view needs its own tensor; the
                # fused call advances every distinct counter once, so there they share one.
                others = len(self.views) - 1
                copies = [value if self.share_counters else _copied(value) for _ in range(others)]
                parts = [value, *copies]
            for number, (view, part) in enumerate(zip(self.views, parts, strict=True)):
                if self.keys_of is None or self.keys_of[number](key):
                    inner[view][key] = part
        if self.apart and isinstance(held.get(STEP), Tensor):
            for view, counter in zip(self.views, held[STEP].tolist(), strict=True):
                if counter == 0:
                    # It starts later, with whatever its optimizer starts with.
                    inner[view] = {}
        self.published = dict(held)


def _elementwise(value: Any, like: Tensor) -> bool:
    """Whether a state value has one number for each element of a tensor."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    return local(value).numel() == local(like).numel()


def merge_slices(slices: Iterable[Slice], group_number: Mapping[str, int]) -> list[Run]:
    """Merge slices of one owner that touch and belong to one group: fewer, longer views."""
    runs: list[Run] = []
    for piece in sorted(slices, key=lambda s: s.offset):
        if runs and _continues(runs[-1], piece, group_number):
            last = runs.pop()
            names, numel, offset = (*last.names, piece.name), last.numel + piece.numel, last.offset
        else:
            names, numel, offset = (piece.name,), piece.numel, piece.offset
        runs.append(Run(owner=piece.owner, offset=offset, numel=numel, names=names))
    return runs


def counters_of_runs(runs: Iterable[Run], at: Mapping[int, float]) -> list[float]:
    """How often each run was stepped, from what its pieces tell; 0 where none tells.

    Args:
        runs: of one owner.
        at: {offset of a piece in the owner: how often it was stepped}.

    Raises:
        ConfigError: two pieces of one run that have counted differently.
    """
    found: list[float] = []
    for run in runs:
        end = run.offset + run.numel
        inside = sorted({at[place] for place in at if run.offset <= place < end})
        if len(inside) > 1:
            raise ConfigError(
                f"{run.names[0]} and {run.names[-1]} were stepped {inside} times,"
                " but this sharder steps them as one, with one counter. Resume under DDP or"
                " FSDP2, or with the timing that they were saved with."
            )
        found.append(inside[0] if inside else 0.0)
    return found


def _continues(run: Run, piece: Slice, group_number: Mapping[str, int]) -> bool:
    same_group = group_number.get(run.names[0]) == group_number.get(piece.name)
    return same_group and run.offset + run.numel == piece.offset


def _part_sizes(runs: Iterable[Run], numel: int) -> tuple[list[int], list[int]]:
    """(sizes that cut a flat tensor at the ends of all runs, which of these are runs)."""
    sizes: list[int] = []
    used: list[int] = []
    position = 0
    for run in runs:
        if run.offset > position:
            sizes.append(run.offset - position)
        used.append(len(sizes))
        sizes.append(run.numel)
        position = run.offset + run.numel
    return ([*sizes, numel - position] if numel > position else sizes), used


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
