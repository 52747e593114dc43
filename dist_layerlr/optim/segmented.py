"""Segmented emission: the sharder sees one group.

The step applies each name's rate on slices of what it holds.

Many groups are slow where every group is partitioned, reduced and gathered alone (ZeRO), and
impossible where many names share one flat parameter (FSDP1). Here the outer optimizer holds the
sharder's tensors in one group. Inside, the user's own optimizer steps views of them, grouped by the
plan: no copies of weights or gradients, no collectives, O(names) memory.

State lives on the outer tensors, as the sharder and its checkpoints expect it; the inner optimizer
works on views of it. Whoever loads state replaces its entries (``optimizer.state[p][key] =
tensor``), as torch's and DeepSpeed's loaders do.

Which call takes the slices is the inner optimizer's choice. Measured on the CPU (12.6 M elements in
960 tensors, one thread, ms a step): 144 rates as one fused call per rate 9-15, one foreach call
with a rate per tensor 62, one flat rate fused 7, one flat rate foreach 69. Adam divides by the
gradient's own size, so a rate cannot be folded into the gradient of a single fused call. Hence:
build AdamW with ``fused=True``, and slices of equal rate that touch are stepped as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError, PlanMismatch
from dist_layerlr.optim import fused
from dist_layerlr.optim.groups import INITIAL_LR, LR, NAME, build_groups, scale_lrs
from dist_layerlr.plan.entries import Plan
from dist_layerlr.sharders.base import ParamGroup, Slice, local

MakeOptimizer = Callable[[list[ParamGroup]], Optimizer]
GROUP_NAME = "segmented"


class Segmented(Optimizer):
    """One group outside, the plan's groups inside.

    Schedulers and ``PlanSchedule`` drive the one outer group; its ratio to ``initial_lr``
    multiplies every planned rate, so no scheduler can flatten them.
    """

    def __init__(
        self,
        plan: Plan,
        owners: Iterable[Tensor],
        make: MakeOptimizer,
        slices: Iterable[Slice] | None = None,
    ):
        """Hold ``owners`` in one group.

        Args:
            plan: of the model.
            owners: what the sharder holds, or (DeepSpeed) what it is given.
            make: groups -> the optimizer that steps the views: any optimizer that works element by
                element. It may give groups settings of their own (betas ...).
            slices: where each name is in the owners. DeepSpeed decides that later: None, and
                ``bind`` after it has.
        """
        self._plan, self._make = plan, make
        self._rows: list[_Row] = []
        self._known: set[int] = set()
        self.inner: Optimizer | None = None
        base = (
            plan.config.per_layer_lr.default_lr
            if plan.config.per_layer_lr.enabled
            else plan.config.flat_lr
        )
        base = base or max((g.lr for g in plan.groups), default=1.0) or 1.0
        group = {"params": list(owners), LR: base, INITIAL_LR: base, NAME: GROUP_NAME}
        super().__init__([group], {})
        if slices is not None:
            self.bind(slices)

    @property
    def factor(self) -> float:
        """The multiplier in force: the outer group's lr over its initial_lr."""
        group = self.param_groups[0]
        return float(group[LR]) / float(group[INITIAL_LR])

    def bind(self, slices: Iterable[Slice]) -> None:
        """Cut the outer tensors into views, one per run of equal settings, and build the inner
        optimizer on them.

        Raises:
            PlanMismatch: the names are not the plan's.
        """
        slices = list(slices)
        spec = {name: i for i, group in enumerate(self._plan.groups) for name in group.names}
        by_owner: dict[int, list[Slice]] = {}
        for piece in slices:
            # Empty shards of DTensors have state too: all ranks must save the same keys.
            if piece.numel or isinstance(piece.owner, DTensor):
                by_owner.setdefault(id(piece.owner), []).append(piece)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        self._rows = [_Row(_runs(found, spec), own=key in held) for key, found in by_owner.items()]
        self._known = {id(row.tensor) for row in self._rows}
        # A group of which this rank holds nothing keeps an empty place, so that groups agree on all
        # ranks.
        empty = [nn.Parameter(torch.empty(0)) for _ in self._plan.groups]
        views: dict[str, Tensor] = {
            s.name: empty[spec[s.name]] if s.name in spec else s.owner for s in slices
        }
        views |= {
            name: v
            for row in self._rows
            for run, v in zip(row.runs, row.views, strict=True)
            for name in run.names
        }
        self.inner = self._make(build_groups(self._plan, views))
        self._fused = fused.handles(self.inner)
        for row in self._rows:
            row.share_counters = self._fused
        self._view_of = {name: id(view) for name, view in views.items()}
        self._places = {_place(s) for s in slices}
        self.defaults = dict(self.inner.defaults)
        scale_lrs(self.inner, self.factor)

    def groups_by_name(self) -> dict[str, ParamGroup]:
        """{name: the inner group that steps it}, at the multiplier in force: where live rates
        stand. Empty if unbound.
        """
        if self.inner is None:
            return {}
        scale_lrs(self.inner, self.factor)
        group_of = {id(p): group for group in self.inner.param_groups for p in group["params"]}
        return {name: group_of[view] for name, view in self._view_of.items() if view in group_of}

    def steps(self, piece: Slice) -> bool:
        """Whether exactly this slice of a live tensor is what is stepped for its name."""
        return _place(piece) in self._places

    @property
    def cuts(self) -> bool:
        """Whether a tensor is stepped in several views.

        Then the state must be elementwise, or scalars.
        """
        return any(len(row.views) > 1 for row in self._rows)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the views of the tensors that have a gradient, at planned rate x the outer group's
        multiplier.

        Raises:
            PlanMismatch: ``bind`` has not been called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = {
            id(p): p for group in self.param_groups for p in group["params"] if p.grad is not None
        }
        if not self._knows(live.values()) or self.inner is None:
            return loss
        # Stage 3 steps sub-group by sub-group: others have gradients too, but are not in the group
        # at that moment.
        stepped = [row for row in self._rows if id(row.tensor) in live]
        for row in stepped:
            row.prepare(self.inner.state, self.state)
        scale_lrs(self.inner, self.factor)
        if self._fused:
            fused.step(self.inner)
        else:
            self.inner.step()
        for row in stepped:
            row.publish(self.inner.state, self.state)
        return loss

    def _knows(self, live: Iterable[Tensor]) -> bool:
        """Whether ``bind`` was told of all these tensors.

        False if the others' gradients are zero.
        """
        strangers = [p for p in live if id(p) not in self._known and local(p).numel()]
        if any(p.grad is not None and bool(local(p.grad).any()) for p in strangers):
            raise PlanMismatch(
                "A segmented optimizer was stepped on tensors that it does not know. "
                "Call dist_layerlr.bind(plan, engine) after deepspeed.initialize."
            )
        return (
            not strangers
        )  # deepspeed 0.19.8 steps on zero gradients inside initialize (stage 0, bf16)


def _place(piece: Slice) -> tuple[str, int, int, int]:
    return piece.name, id(piece.owner), piece.offset, piece.numel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Neighbouring slices of one owner that share all settings."""

    owner: Tensor
    offset: int
    numel: int
    names: tuple[str, ...]


State = dict[Any, dict[str, Any]]
"""``optimizer.state``: {tensor: {key: value}}."""


@dataclass(slots=True)
class _Row:
    """An outer tensor, and the views of it that the inner optimizer steps."""

    runs: Sequence[_Run]
    own: bool
    """The one view is the tensor itself; then both optimizers share its state. Given: whether that
    is allowed, which it is not where the sharder steps some of its tensors at a time (ZeRO-3):
    gradients of the others must not be seen."""
    tensor: Tensor = field(init=False)
    views: list[Tensor] = field(init=False)
    sizes: list[int] = field(init=False)
    """Sizes of all cuts of the flattened local tensor, gaps (padding, frozen parameters)
    included."""
    used: list[int] = field(init=False)
    """Which cuts are views."""
    share_counters: bool = False
    """Whether all views may count steps in one tensor."""
    published: dict[str, Any] = field(default_factory=dict)
    """State as this class left it on the tensor, to notice a load."""

    def __post_init__(self) -> None:
        self.tensor = self.runs[0].owner
        self.sizes, self.used = _cuts(self.runs, local(self.tensor).numel())
        self.own = self.own and len(self.sizes) == 1 and not isinstance(self.tensor, DTensor)
        if self.own:
            self.views = [self.tensor]
        else:
            self.views = [nn.Parameter(cut) for cut in self.cut(local(self.tensor).detach())]

    def cut(self, tensor: Tensor) -> Sequence[Tensor]:
        """The views' parts of a local tensor laid out as the owner."""
        if len(self.sizes) == 1:
            return (tensor,)
        cuts = tensor.view(-1).split_with_sizes(self.sizes)
        return [cuts[i] for i in self.used]

    def prepare(self, inner: State, outer: State) -> None:
        """Point the views at the live storage, the live gradient, and the live state."""
        if self.own:
            if self.tensor in outer:
                inner[self.tensor] = outer[self.tensor]
            return
        tensor = local(self.tensor)
        if (
            self.views[0].data_ptr()
            != tensor.data_ptr() + self.runs[0].offset * tensor.element_size()
        ):
            for view, cut in zip(self.views, self.cut(tensor.detach()), strict=True):
                view.data = cut
        assert self.tensor.grad is not None
        for view, gradient in zip(self.views, self.cut(local(self.tensor.grad)), strict=True):
            view.grad = gradient
        held = outer.get(self.tensor, {})
        if len(held) != len(self.published) or any(
            held.get(k) is not v for k, v in self.published.items()
        ):
            self._adopt(inner, held)

    def publish(self, inner: State, outer: State) -> None:
        """Let the state on the outer tensor be what the step left."""
        if self.own:
            outer[self.tensor] = inner[self.tensor]
            return
        for view in self.views:
            view.grad = None
        first = inner.get(self.views[0], {})
        held = outer[self.tensor]
        if not self.published:
            for key, value in first.items():
                elementwise = self._elementwise(value, self.views[0])
                if (
                    not elementwise
                    and len(self.views) > 1
                    and isinstance(value, Tensor)
                    and value.ndim
                ):
                    raise ConfigError(
                        f"Invalid optimizer for slices of a flat tensor: its state {key!r}"
                        f" {tuple(value.shape)} is neither a scalar nor as long as its slice"
                        f" ({self.views[0].numel()}). Use AdamW."
                    )
                held[key] = self._laid_out(inner, key) if elementwise else value
            self._adopt(inner, held)
        for key, value in first.items():
            if not self._elementwise(value, self.views[0]) and held[key] is not value:
                held[key] = self.published[key] = (
                    value  # a plain counter, or one that the optimizer replaced
                )

    def _laid_out(self, inner: State, key: str) -> Tensor:
        """The views' state as one tensor, sharded like the owner."""
        parts: list[Tensor] = [inner[view][key] for view in self.views]
        whole = parts[0]
        if len(self.sizes) > 1:
            whole = torch.zeros_like(local(self.tensor).detach(), dtype=whole.dtype)
            for part, cut in zip(parts, self.cut(whole), strict=True):
                cut.copy_(part)
        if not isinstance(self.tensor, DTensor):
            return whole
        mesh, placements = self.tensor.device_mesh, self.tensor.placements
        return DTensor.from_local(
            whole,
            mesh,
            placements,
            run_check=False,
            shape=self.tensor.shape,
            stride=self.tensor.stride(),
        )

    def _adopt(self, inner: State, held: dict[str, Any]) -> None:
        """Make the inner state views of the outer state: after the first step, and after a load."""
        for view in self.views:
            inner[view] = {}
        for key, value in held.items():
            if self._elementwise(value, self.tensor):
                parts = self.cut(local(value))
            else:
                parts = [
                    value,
                    *(value if self.share_counters else _copied(value) for _ in self.views[1:]),
                ]
            for view, part in zip(self.views, parts, strict=True):
                inner[view][key] = part
        self.published = dict(held)

    @staticmethod
    def _elementwise(value: Any, like: Tensor) -> bool:
        return (
            isinstance(value, Tensor)
            and value.ndim > 0
            and local(value).numel() == local(like).numel()
        )


def _runs(slices: Iterable[Slice], spec: dict[str, int]) -> list[_Run]:
    """Merge slices of one owner that touch and belong to one group."""
    runs: list[_Run] = []
    for piece in sorted(slices, key=lambda s: s.offset):
        last = runs[-1] if runs else None
        touches = last is not None and last.offset + last.numel == piece.offset
        if last is not None and touches and spec.get(last.names[0]) == spec.get(piece.name):
            runs[-1] = _Run(
                owner=last.owner,
                offset=last.offset,
                numel=last.numel + piece.numel,
                names=(*last.names, piece.name),
            )
        else:
            runs.append(
                _Run(owner=piece.owner, offset=piece.offset, numel=piece.numel, names=(piece.name,))
            )
    return runs


def _cuts(runs: Iterable[_Run], numel: int) -> tuple[list[int], list[int]]:
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
