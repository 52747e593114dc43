"""Segmented emission: the sharder sees one parameter group, each name is stepped at its own rate.

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

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.optim import fused
from dist_layerlr.optim.exchange import Held
from dist_layerlr.optim.groups import (
    INITIAL_LR,
    LR,
    NAME,
    STEP,
    UNKNOWN,
    base_lr,
    build_groups,
    built,
    groups_by_tensor,
    scale_lrs,
)
from dist_layerlr.optim.routed import Routed
from dist_layerlr.optim.timed import known_step, step_of, without_held
from dist_layerlr.optim.views import OwnerViews, merge_slices
from dist_layerlr.optim.whole import Located, NeedsWhole
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
        self._slices: list[Slice] | None = None
        self._rows: list[OwnerViews] = []
        self._known: set[int] = set()
        self.inner: Optimizer | None = None
        self._pieces: list[Slice] = []
        self._placed: tuple[Sequence[Held], int, frozenset[str]] | None = None
        slices = None if slices is None else list(slices)
        base = base_lr(plan)
        groups = [
            {"params": members, LR: base, INITIAL_LR: base, NAME: name}
            for name, members in _outer_groups(plan, owners, slices or ()).items()
        ]
        for group in groups if plan.timed else ():
            group[STEP] = UNKNOWN
        # Schedulers take an absolute end relative to the default rate: it must be the group's.
        super().__init__(groups, {LR: base})
        if slices is not None:
            self.bind(slices)

    @property
    def factor(self) -> float:
        """The multiplier in force: the outer group's lr over its initial_lr.

        Raises:
            PlanMismatch: outer groups are at several: a scheduler with a function for each, or an
                edit of one of them.
        """
        found: dict[str, float] = {}
        for group in self.param_groups:
            # Others than those made here are strangers, which verify tells.
            if INITIAL_LR in group:
                found[str(group.get(NAME))] = float(group[LR]) / float(group[INITIAL_LR])
        first, *others = found.values()
        # Some schedulers keep rates in float32.
        if not all(math.isclose(first, other, rel_tol=1e-6) for other in others):
            raise PlanMismatch(
                f"The optimizer's groups are at several multiples of the plan: {found}. One"
                " schedule drives all names, so give every group the same multiple; in the config"
                " optimizers.*.lr_multiplier and per_layer_lr set rates apart."
            )
        return first

    def bind(self, slices: Iterable[Slice]) -> None:
        """Cut the outer tensors into views and build the inner optimizer on them.

        Call it before the first step: inner state of an earlier binding is lost.

        Raises:
            PlanMismatch: the names are not the plan's.
        """
        slices = self._slices = list(slices)
        group_number = {
            name: number for number, group in enumerate(self._plan.groups) for name in group.names
        }
        self._rows = self._cut(slices, group_number)
        # Also what holds no element: under ZeRO a rank's part may be padding alone, and it takes
        # part in the exchange of matrices all the same.
        self._known = {id(piece.owner) for piece in slices}
        # Under DDP and FSDP1 with original parameters every owner is its own view. The two
        # optimizers then keep one state mapping, and no row has anything to prepare or publish.
        self._one_state = all(row.shares_state for row in self._rows)
        views = self._views(slices, group_number)
        self.inner = built(self._make, build_groups(self._plan, views))
        self._fused = fused.handles(self.inner)
        for row in self._rows:
            row.share_counters = self._fused
            row.plain_counters = not type(self.inner).__module__.startswith("torch.")
            if isinstance(self.inner, Routed):
                row.keys_of = _keys_of(self.inner, self._plan, row)
        self._view_of = {name: id(view) for name, view in views.items()}
        self._bound: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for piece in slices:
            self._bound[_whose(piece)].append((piece.offset, piece.offset + piece.numel))
        self.defaults = {**self.inner.defaults, LR: base_lr(self._plan)}
        self._follow()

    def _follow(self) -> None:
        """Put the outer groups' multiplier and step on the inner groups."""
        scale_lrs(self.inner, self.factor, step_of(self))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, without the views: copied, they would share no storage."""
        kept = ("_plan", "_make", "_slices", "_pieces", "_placed")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bind a copy to its own tensors, which its groups and slices hold."""
        super().__setstate__(state)
        if "_slices" not in state:
            return  # torch's load_state_dict comes here too, and replaces state and groups alone
        self._rows, self._known, self.inner = [], set(), None
        if self._slices is not None:
            self.bind(self._slices)
        if self._placed is not None:
            self.place(self._pieces, *self._placed)

    def place(
        self, pieces: Iterable[Slice], table: Sequence[Held], me: int, alone: frozenset[str]
    ) -> None:
        """Tell optimizers that need whole matrices where the parts are.

        Args:
            pieces: every run of elements on this rank, as ``Sharder.pieces`` lists them: a slice of
                a DTensor's local part may be many.
            table: for every rank, the runs that it holds of each name.
            me: this rank's place in the table.
            alone: names of which each rank has a tensor of its own.
        """
        self._pieces, self._placed = list(pieces), (table, me, alone)
        views: dict[tuple[int, str], tuple[Tensor, int]] = {}
        for row in self._rows:
            for run, view in zip(row.runs, row.views, strict=True):
                # Neighbouring names of one group share a view: each begins somewhere in it.
                for name in run.names:
                    views[id(row.owner), name] = view, run.offset
        located: list[Located] = []
        for piece in self._pieces:
            if piece.numel:
                view, first = views[id(piece.owner), piece.name]
                place = {"offset": piece.offset - first, "numel": piece.numel}
                located.append(Located(name=piece.name, start=piece.start, view=view, **place))
        assert isinstance(self.inner, Routed)
        for part in self.inner.parts.values():
            if isinstance(part, NeedsWhole):
                part.place(located, table, me, alone)

    @torch.no_grad()
    def _cut(self, slices: list[Slice], group_number: Mapping[str, int]) -> list[OwnerViews]:
        """One row per outer tensor, cut into runs of slices that touch and share a group."""
        by_owner: dict[int, list[Slice]] = {}
        for piece in slices:
            # Empty shards of DTensors have state too: all ranks must save the same keys.
            if piece.numel or isinstance(piece.owner, DTensor):
                by_owner.setdefault(id(piece.owner), []).append(piece)
        # Tensors that DeepSpeed will put into our group later, one sub-group at a time, are not in
        # it now: only what is held already may share its state with the inner optimizer.
        held = groups_by_tensor(self)
        return [
            OwnerViews(
                merge_slices(found, group_number),
                may_share_state=owner in held,
                may_start_apart=self._plan.timed,
            )
            for owner, found in by_owner.items()
        ]

    def _views(self, slices: list[Slice], group_number: Mapping[str, int]) -> dict[str, Tensor]:
        """{name: what the inner optimizer steps for it}."""
        # A group of which this rank holds nothing keeps an empty parameter in its place: the inner
        # groups, and with them the keys of a state_dict, are then the same on all ranks.
        places = [nn.Parameter(torch.empty(0)) for _ in self._plan.groups]
        views: dict[str, Tensor] = {}
        for piece in slices:
            number = group_number.get(piece.name)
            # A name that the plan lacks stays as it is: build_groups refuses it with its name.
            views[piece.name] = piece.owner if number is None else places[number]
        for row in self._rows:
            for run, view in zip(row.runs, row.views, strict=True):
                views.update(dict.fromkeys(run.names, view))
        return views

    def groups_by_name(self) -> dict[str, ParamGroup]:
        """{name: the inner group that steps it}: live rates stand there. Empty if unbound."""
        if self.inner is None:
            return {}
        # Inner rates follow the outer group at each step only; a reader wants those of the next.
        self._follow()
        group_of = groups_by_tensor(self.inner)
        return {name: group_of[view] for name, view in self._view_of.items() if view in group_of}

    def steps(self, piece: Slice) -> bool:
        """Whether this slice of a live tensor is stepped for its name, alone or in a longer one."""
        first, last = piece.offset, piece.offset + piece.numel
        for start, end in self._bound.get(_whose(piece), ()):
            if start <= first and last <= end:
                return True
        return False

    @property
    def cuts(self) -> bool:
        """Whether a tensor is stepped in several views.

        Then the state must be elementwise, or scalars.
        """
        return any(len(row.views) > 1 for row in self._rows)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step what has a gradient, each name at its planned rate x the outer group's multiplier.

        Raises:
            PlanMismatch: ``bind`` has not been called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._knows_all() or self.inner is None:
            return loss
        if self._plan.timed:
            known_step(self)
        self._follow()
        with without_held(self.inner) as any_left:
            if any_left:
                self._step_inner()
        return loss

    def _step_inner(self) -> None:
        """Step the groups that the inner optimizer holds now."""
        assert self.inner is not None
        rows: list[OwnerViews] = []
        if self._one_state:
            # A load replaces the outer mapping, so the inner optimizer is given it at every step.
            # Optimizers look up missing entries in it, which only a defaultdict has.
            if not isinstance(self.state, defaultdict):
                self.state = defaultdict(dict, self.state)
            if self.inner.state is not self.state:
                # Some count by a key that is no tensor, which their constructor has set.
                for key in self.inner.state.keys() - self.state.keys():
                    if not isinstance(key, Tensor):
                        self.state[key] = self.inner.state[key]
            self.inner.state = self.state
        else:
            rows = self._rows_to_step()
        for row in rows:
            row.prepare(self.inner.state, self.state)
        if self._fused:
            fused.step(self.inner)
        else:
            self.inner.step()
        for row in rows:
            row.publish(self.inner.state, self.state)

    def _rows_to_step(self) -> list[OwnerViews]:
        """Rows whose owner has a gradient and is in the outer group.

        Stage 3 steps sub-group by sub-group: the owners of the others have gradients too, but are
        not in the group at that moment.
        """
        held = groups_by_tensor(self)
        rows = [row for row in self._rows if id(row.owner) in held and row.owner.grad is not None]
        if not self._plan.timed:
            return rows
        # What the inner optimizer does not step now gets no state either.
        stepped = groups_by_tensor(self.inner)
        return list(filter(lambda row: any(id(view) in stepped for view in row.views), rows))

    def row_of(self, piece: Slice) -> OwnerViews | None:
        """How the owner of a piece is cut; None: nothing of it is stepped here."""
        return next((row for row in self._rows if row.owner is piece.owner), None)

    def counters_of(self, piece: Slice, held: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a piece's owner, with the step counter that is the piece's own."""
        own = dict(held)
        row = self.row_of(piece)
        if row is not None and row.apart and not piece.numel:
            # Its name is counted where it has elements.
            own.pop(fused.STEP, None)
        elif row is not None and fused.STEP in own:
            own[fused.STEP] = row.counter_at(piece.offset, own[fused.STEP])
        return own

    def _knows_all(self) -> bool:
        """Whether ``bind`` was told of every tensor that has a gradient.

        False if the others' gradients are zero.
        """
        strangers: list[Tensor] = []  # their gradients
        for group in self.param_groups:
            for param in group["params"]:
                # Identity comes first: reading a gradient costs more, and few are strangers.
                if id(param) not in self._known and param.grad is not None and local(param).numel():
                    strangers.append(param.grad)
        if any(bool(local(gradient).any()) for gradient in strangers):
            raise PlanMismatch(
                "A segmented optimizer was stepped on tensors that it does not know. "
                "Call dist_layerlr.bind(plan, engine) after deepspeed.initialize."
            )
        # DeepSpeed 0.19.8 steps on zero gradients inside initialize (stage 0, bf16), before bind
        # can have been called. Such a step must do nothing, weight decay included.
        return not strangers


def _outer_groups(
    plan: Plan, owners: Iterable[Tensor], slices: Iterable[Slice]
) -> dict[str, list[Tensor]]:
    """{name of an outer group: its tensors}: one group for each optimizer of the plan.

    DeepSpeed lays the tensors of a group end to end. State of several optimizers in one flat tensor
    would take the room of all of them for every element.
    """
    if plan.config.optimizers is None:
        return {GROUP_NAME: list(owners)}
    labels: dict[int, set[str]] = {}
    for piece in slices:
        if piece.name in plan.entries:
            labels.setdefault(id(piece.owner), set()).add(str(plan.entries[piece.name].optimizer))
    found: dict[str, list[Tensor]] = {}
    for owner in owners:
        steppers = "+".join(sorted(labels.get(id(owner), ())))
        found.setdefault(f"{GROUP_NAME} {steppers}".strip(), []).append(owner)
    return found


def _keys_of(routed: Routed, plan: Plan, row: OwnerViews) -> list[Callable[[str], bool]] | None:
    """For each view, which keys of the owner's state are its optimizer's; None: all are of one."""
    labels = [str(plan.entries[run.names[0]].optimizer) for run in row.runs]
    if len(set(labels)) == 1:
        return None
    return [partial(routed.takes, label) for label in labels]


def _whose(piece: Slice) -> tuple[str, int]:
    return piece.name, id(piece.owner)
