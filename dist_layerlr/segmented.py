"""Segmented emission: the sharder sees one group; the step applies each name's rate on slices of what it holds.

Many groups are slow where every group is partitioned, reduced and gathered alone (ZeRO), and impossible where many names
share one flat parameter (FSDP1). Here the outer optimizer holds the sharder's tensors in one group. Inside, the user's own
optimizer steps views of them, grouped by the plan: no copies of weights or gradients, no collectives, O(names) memory.

State lives on the outer tensors, as the sharder expects it; the inner optimizer works on views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.groups import INITIAL_LR, LR, NAME, ParamGroup, build_groups, scale_lrs
from dist_layerlr.plan import Plan

MakeOptimizer = Callable[[list[ParamGroup]], Optimizer]
GROUP_NAME = "segmented"
STEP = "step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One name's elements in one outer tensor."""

    name: str
    owner: Tensor
    offset: int
    """First element in the flattened local owner."""
    numel: int


@dataclass(slots=True)
class _Owner:
    """An outer tensor, cut into views that the inner optimizer steps."""

    tensor: Tensor
    slices: list[Slice]
    views: list[nn.Parameter]
    sizes: list[int]
    """Sizes of all cuts of the flattened local tensor, gaps (padding, frozen parameters) included."""
    used: list[int]
    """Which cuts are views."""
    published: dict[str, Any] = field(default_factory=dict)
    """State tensors as this class left them in the outer state, to notice a load."""

    @property
    def whole(self) -> bool:
        """One view of the whole tensor, in its own shape."""
        return len(self.slices) == 1 and self.slices[0].numel == local(self.tensor).numel()

    def cut(self, tensor: Tensor) -> Iterable[Tensor]:
        """The same cuts of a tensor laid out as the owner."""
        if self.whole:
            return (tensor,)
        cuts = tensor.view(-1).split_with_sizes(self.sizes)
        return [cuts[i] for i in self.used]


class Segmented(Optimizer):
    """One group outside, the plan's groups inside.

    Schedulers and ``PlanSchedule`` drive the one outer group; its ratio to ``initial_lr`` multiplies every planned rate, so
    no scheduler can flatten them.
    """

    def __init__(
        self, plan: Plan, owners: Iterable[Tensor], make: MakeOptimizer, slices: Iterable[Slice] | None = None
    ):
        """Hold ``owners`` in one group.

        Args:
            plan: of the model.
            owners: what the sharder holds, or (DeepSpeed) what it is given.
            make: groups -> the optimizer that steps the views: any optimizer that works element by element.
            slices: where each name is in the owners. DeepSpeed decides that later: None, and ``bind`` after it has.
        """
        self._plan, self._make = plan, make
        self._table: list[_Owner] = []
        self.inner: Optimizer | None = None
        base = plan.config.per_layer_lr.default_lr if plan.config.per_layer_lr.enabled else plan.config.flat_lr
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
        """Cut the outer tensors into per-name views and build the inner optimizer on them.

        Raises:
            PlanMismatch: the names are not the plan's.
        """
        slices = list(slices)
        by_owner: dict[int, list[Slice]] = {}
        for piece in slices:
            if piece.numel:
                by_owner.setdefault(id(piece.owner), []).append(piece)
        self._table = [_cut(sorted(found, key=lambda s: s.offset)) for found in by_owner.values()]
        # A name of which this rank holds nothing keeps an empty place, so that groups agree on all ranks.
        views: dict[str, Tensor] = {s.name: nn.Parameter(torch.empty(0)) for s in slices}
        views |= {s.name: v for row in self._table for s, v in zip(row.slices, row.views, strict=True)}
        self.inner = self._make(build_groups(self._plan, views))
        self._names = {id(view): name for name, view in views.items()}
        self._places = {(s.name, id(s.owner), s.offset, s.numel) for s in slices}
        self.defaults = dict(self.inner.defaults)
        scale_lrs(self.inner, self.factor)

    def unbind(self) -> None:
        """Forget all slices, before ``bind`` gives others. Inner state is lost: bind before the first step."""
        self._table, self.inner = [], None

    def groups_by_name(self) -> dict[str, ParamGroup]:
        """{name: the inner group that steps it}, at the multiplier in force: where live rates stand. Empty if unbound."""
        if self.inner is None:
            return {}
        scale_lrs(self.inner, self.factor)
        return {self._names[id(p)]: group for group in self.inner.param_groups for p in group["params"]}

    def steps(self, name: str, owner: Tensor, offset: int, numel: int) -> bool:
        """Whether exactly this run of a live tensor is what is stepped for a name."""
        return (name, id(owner), offset, numel) in self._places

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the views of the tensors that have a gradient, at planned rate x the outer group's multiplier.

        Raises:
            PlanMismatch: ``bind`` has not been called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        live = {id(p): p for group in self.param_groups for p in group["params"] if p.grad is not None}
        stepped = [row for row in self._table if id(row.tensor) in live]
        if self.inner is None or len(stepped) < sum(local(p).numel() > 0 for p in live.values()):
            raise PlanMismatch(
                "A segmented optimizer was stepped on tensors that it does not know. "
                "Call dist_layerlr.bind(plan, engine) after deepspeed.initialize."
            )
        for row in stepped:
            self._prepare(row)
        scale_lrs(self.inner, self.factor)
        self.inner.step()
        for row in stepped:
            self._publish(row)
            for view in row.views:
                view.grad = None
        return loss

    def _prepare(self, row: _Owner) -> None:
        """Point the views at the live storage, the live gradient, and the live state."""
        tensor = local(row.tensor)
        if row.views[0].data_ptr() != tensor.data_ptr() + row.slices[0].offset * tensor.element_size():
            for view, cut in zip(row.views, row.cut(tensor.detach()), strict=True):
                view.data = cut
        assert row.tensor.grad is not None
        for view, gradient in zip(row.views, row.cut(local(row.tensor.grad)), strict=True):
            view.grad = gradient
        held = self.state.get(row.tensor, {})
        if (
            any(held.get(key) is not value for key, value in row.published.items())
            or held.keys() - row.published.keys()
        ):
            self._adopt(row, held)

    def _publish(self, row: _Owner) -> None:
        """After the first step: lay the inner state out like the owner, and let the inner optimizer work on views of it."""
        if row.published:
            self._count(row)
            return
        assert self.inner is not None
        first = self.inner.state.get(row.views[0], {})
        held = self.state[row.tensor]
        for key, value in first.items():
            held[key] = self._laid_out(row, key) if _is_elementwise(value, row.views[0]) else _copied(value)
        row.published = dict(held)
        self._adopt(row, held)

    def _count(self, row: _Owner) -> None:
        """Keep the outer step counter, which checkpoints read, in step."""
        assert self.inner is not None
        held = self.state[row.tensor]
        inner = self.inner.state[row.views[0]].get(STEP)
        if isinstance(inner, Tensor) and isinstance(held.get(STEP), Tensor):
            held[STEP].copy_(inner)
        elif inner is not None:
            held[STEP] = row.published[STEP] = inner

    def _laid_out(self, row: _Owner, key: str) -> Tensor:
        assert self.inner is not None
        if row.whole:
            whole: Tensor = self.inner.state[row.views[0]][key]
            return whole
        outer = torch.zeros_like(local(row.tensor).detach(), dtype=self.inner.state[row.views[0]][key].dtype)
        for view, cut in zip(row.views, row.cut(outer), strict=True):
            cut.copy_(self.inner.state[view][key])
        return outer

    def _adopt(self, row: _Owner, held: dict[str, Any]) -> None:
        """Make the inner state views of the outer state: after the first step, and after a load."""
        assert self.inner is not None
        size = local(row.tensor).numel()
        for key, value in held.items():
            elementwise = isinstance(value, Tensor) and value.ndim > 0 and value.numel() == size
            parts = list(row.cut(value)) if elementwise else [_copied(value) for _ in row.views]
            for view, part in zip(row.views, parts, strict=True):
                self.inner.state[view][key] = part
        row.published = dict(held)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, without DTensor dispatch afterwards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut(slices: list[Slice]) -> _Owner:
    """Views of the slices of one owner, in order; the runs between them are cut off and left alone."""
    owner = slices[0].owner
    sizes: list[int] = []
    used: list[int] = []
    position = 0
    for piece in slices:
        if piece.offset > position:
            sizes.append(piece.offset - position)
        used.append(len(sizes))
        sizes.append(piece.numel)
        position = piece.offset + piece.numel
    rest = local(owner).numel() - position
    row = _Owner(owner, slices, [], [*sizes, rest] if rest > 0 else sizes, used)
    row.views = [nn.Parameter(cut, requires_grad=True) for cut in row.cut(local(owner).detach())]
    return row


def _is_elementwise(value: Any, view: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() == view.numel()


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
