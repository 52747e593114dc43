"""Optimizers that need whole matrices, on slices: each is put together on one rank for the step.

What works element by element stays with the slices: weights, gradients, momentum and decay. What
does not is computed on one rank for each matrix, balanced over ranks by cost, and the result goes
back to the slices. So state lies as the sharder lays out weights, in any layout, and no rank
computes what another does.

Muon sends each element twice in bf16, the precision in which torch orthogonalises: no digit is lost
on the way. Any other matrix optimizer (SOAP, Shampoo, Adafactor) sends weight and gradient as they
are and gets the weight back; its state stays on the owner's rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.errors import PlanMismatch
from dist_layerlr.optim.exchange import Exchange, Held, Schedule, Segment
from dist_layerlr.optim.groups import LR, NAME, WEIGHT_DECAY
from dist_layerlr.optim.orthogonal import orthogonalise
from dist_layerlr.plan.entries import Plan, PlanEntry
from dist_layerlr.sharders.base import ParamGroup

MakeOptimizer = Callable[[list[ParamGroup]], Optimizer]
MOMENTUM = "muon_momentum"
"""Key of the state. Not torch's ``momentum_buffer``, which SGD has in the same flat tensor."""
_TRAVELS = torch.bfloat16
"""torch's Muon rounds to it before it orthogonalises, and its result is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Some elements of a name, and where they lie in a tensor that is stepped."""

    name: str
    start: int
    numel: int
    view: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The same elements of a tensor laid out as the view; flat, unless it is all of it."""
        if self.offset == 0 and self.numel == tensor.numel():
            return tensor  # in whatever memory order
        return tensor.view(-1)[self.offset : self.offset + self.numel]


class NeedsWhole(Optimizer):
    """Steps slices of matrices; a subclass says what is done with the whole."""

    state_keys: frozenset[str] = frozenset()
    """What it keeps for each element, with the slices."""
    fixed_owners = False

    def __init__(self, plan: Plan, make: MakeOptimizer, groups: list[ParamGroup]):
        """Step ``groups``, whose tensors are slices, with the settings that ``make`` gives them."""
        self.make = make
        self.template = make_template(plan, make, groups)
        """The user's optimizer, on empty matrices of the true shapes: it has the settings."""
        # `make` may have given groups settings of their own (betas, ns_steps): all but the tensors
        # is taken from the template's groups.
        live = [
            {**told, "params": group["params"]}
            for told, group in zip(self.template.param_groups, groups, strict=True)
        ]
        # With defaults torch would fill in what a group lacks; these lack nothing, and whoever
        # reads `defaults` gets the template's.
        super().__init__(live, {})
        self.defaults = dict(self.template.defaults)
        self._groups_of = {name: spec.name for spec in plan.groups for name in spec.names}
        wanted = {group[NAME] for group in groups}
        self.entries: dict[str, PlanEntry] = {
            name: plan.entries[name]
            for spec in plan.groups
            if spec.name in wanted
            for name in spec.names
        }
        self._located: dict[str, list[Located]] = {}
        self.exchanges: list[Exchange] = []
        """Of what ranks share, and of what this rank keeps for itself."""

    @property
    def kind(self) -> str:
        """Class of the optimizer that works on the whole."""
        return type(self.template).__name__

    def place(
        self, located: Iterable[Located], table: Sequence[Held], me: int, alone: Set[str]
    ) -> None:
        """Say where this rank's slices are.

        Args:
            located: of this rank.
            table: what every rank holds.
            me: this rank's place in the table.
            alone: names of which each rank has a tensor of its own, with other values.
        """
        self._located = {}
        for piece in located:
            if piece.name in self.entries:
                self._located.setdefault(piece.name, []).append(piece)
        # Two tensors of one name must never meet: each rank steps its own, without the others.
        self.exchanges = [
            self._exchange(table, me, self.entries.keys() - alone),
            self._exchange([table[me]], 0, self.entries.keys() & alone),
        ]

    def _exchange(self, table: Sequence[Held], me: int, names: Set[str]) -> Exchange:
        entries = {name: entry for name, entry in self.entries.items() if name in names}
        return Exchange(
            table=table,
            sizes={name: entry.numel for name, entry in entries.items()},
            costs={name: _cost(entry.shape) for name, entry in entries.items()},
            me=me,
            fixed=self.fixed_owners,
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the names that have a gradient on any rank. Collective."""
        if not self.exchanges:
            raise PlanMismatch(
                f"{self.kind} needs whole matrices, and nobody said where their parts are. Build"
                " the optimizer with attach; after deepspeed.initialize call bind(plan, engine)."
            )
        stepped: dict[str, list[Located]] = {}
        for name, pieces in self._located.items():
            stepped[name] = [piece for piece in pieces if piece.view.grad is not None]
        torn = [n for n, pieces in self._located.items() if len(stepped[n]) < len(pieces)]
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}
        active = [n for n, pieces in stepped.items() if pieces]
        # Asked on every rank, also on one that holds nothing: it may own what others step. Of all
        # exchanges before anything changes, because the answer may be an error.
        asked = [exchange for exchange in self.exchanges if exchange.sizes]
        agreed = [exchange.agreed(active, torn) for exchange in asked]
        self._before(group_of)
        for exchange, names in zip(asked, agreed, strict=True):
            for schedule in exchange.rounds(names):
                self._round(exchange, schedule, stepped, group_of)

    def _before(self, group_of: Mapping[int, ParamGroup]) -> None:
        """What is done element by element before anything travels."""

    def _round(
        self,
        exchange: Exchange,
        schedule: Schedule,
        stepped: Mapping[str, Sequence[Located]],
        group_of: Mapping[int, ParamGroup],
    ) -> None:
        raise NotImplementedError

    def setting_of(self, name: str) -> ParamGroup:
        """The live group of a name, which this rank may hold no element of."""
        wanted = self._groups_of[name]
        return next(group for group in self.param_groups if group[NAME] == wanted)


class MuonSlices(NeedsWhole):
    """torch.optim.Muon on slices: it orthogonalises, momentum and decay are kept here."""

    state_keys = frozenset({MOMENTUM})

    def _before(self, group_of: Mapping[int, ParamGroup]) -> None:
        for group in self.param_groups:
            views = [view for view in group["params"] if view.grad is not None]
            if not views:
                continue
            for view in views:
                if MOMENTUM not in self.state[view]:
                    # In the memory order of the view: a piece cuts weight, gradient and momentum at
                    # one offset.
                    self.state[view][MOMENTUM] = torch.zeros_like(view)
            # As torch's Muon counts: a share of the gradient, not the sum of Polyak's.
            momenta = [self.state[view][MOMENTUM] for view in views]
            torch._foreach_lerp_(momenta, [v.grad for v in views], 1.0 - group["momentum"])
            # torch's Muon decays before it adds the update, by the rate of the group and not the
            # one adjusted to the shape.
            kept = 1.0 - float(group[LR]) * float(group[WEIGHT_DECAY])
            for view in views:
                # One by one: on CPUs torch's call for many rounds the number to bf16 first, in
                # which 0.998 is 0.996, twice the decay.
                view.mul_(kept)

    def _round(
        self,
        exchange: Exchange,
        schedule: Schedule,
        stepped: Mapping[str, Sequence[Located]],
        group_of: Mapping[int, ParamGroup],
    ) -> None:
        sent: dict[str, list[tuple[int, Tensor]]] = {}
        for name in schedule.sizes:
            for piece in stepped.get(name, ()):
                group = group_of[id(piece.view)]
                # A copy in any case: it is used up, and may be the momentum of a bf16 weight.
                update = self.direction(piece, group).to(_TRAVELS, copy=True).reshape(-1)
                sent.setdefault(name, []).append((piece.start, update))
        whole = exchange.gather(schedule, sent, _TRAVELS)
        asked = []
        for name, values in whole.items():
            entry = self.entries[name]
            asked.append((values.view(entry.shape), entry.parts, self.setting_of(name)))
        for name, found in zip(whole, orthogonalise(asked), strict=True):
            whole[name] = found.reshape(-1)
        back: dict[str, list[tuple[Segment, Tensor]]] = {}
        for segment, values in exchange.give_back(schedule, whole, _TRAVELS):
            back.setdefault(segment.name, []).append((segment, values))
        for name, results in back.items():
            for piece in stepped.get(name, ()):
                self._add(piece, results, group_of[id(piece.view)])

    def direction(self, piece: Located, group: ParamGroup) -> Tensor:
        """What is orthogonalised: the momentum that this step has left, or Nesterov's."""
        momentum = piece.of(self.state[piece.view][MOMENTUM])
        if not group["nesterov"]:
            return momentum
        gradient = piece.view.grad
        assert gradient is not None
        return piece.of(gradient).lerp(momentum, group["momentum"])

    def _add(
        self, piece: Located, results: Sequence[tuple[Segment, Tensor]], group: ParamGroup
    ) -> None:
        weight = piece.of(piece.view.detach())
        entry, lr = self.entries[piece.name], float(group[LR])
        for segment, values in results:
            # A name may have several runs on this rank; each is returned as a segment of its own.
            if segment.start != piece.start or segment.numel != piece.numel:
                continue
            values = values.to(weight.device)
            for first, last, shape in rows_of(entry):
                low, high = max(first, piece.start), min(last, piece.start + piece.numel)
                # A slice may hold parts of several matrices in one, each with a rate of its own.
                if low >= high:
                    continue
                scale = -lr * adjusted(shape, group.get("adjust_lr_fn"))
                # Whole rows are added in their own shape: where a weight's memory is not in order
                # it has no flat view.
                if weight.shape == entry.shape:
                    part = weight[low // shape[1] : high // shape[1]]
                    part.add_(values[low:high].view(part.shape), alpha=scale)
                elif high - low == weight.numel():
                    weight.add_(values.view(weight.shape), alpha=scale)
                else:
                    here = slice(low - piece.start, high - piece.start)
                    weight.view(-1)[here].add_(values[here], alpha=scale)


def make_template(plan: Plan, make: MakeOptimizer, groups: Sequence[ParamGroup]) -> Optimizer:
    """The user's optimizer on empty matrices, one for each part of a fused one."""
    shapes: dict[str, list[nn.Parameter]] = {}
    # On the meta device: it is asked for its settings, and never stepped.
    for spec in plan.groups:
        for name in spec.names:
            for _, _, shape in rows_of(plan.entries[name]):
                # A meta tensor costs no memory, and a constructor that asks for matrices (Muon's)
                # sees some.
                empty = nn.Parameter(torch.empty(shape, device="meta"))
                shapes.setdefault(spec.name, []).append(empty)
    return make([{**group, "params": shapes[group[NAME]]} for group in groups])


def rows_of(entry: PlanEntry) -> list[tuple[int, int, tuple[int, ...]]]:
    """(first element, end, shape) of each matrix in a parameter: one, or the parts of a fused."""
    if not entry.parts:
        return [(0, entry.numel, entry.shape)]
    width = entry.shape[1]
    found: list[tuple[int, int, tuple[int, ...]]] = []
    first = 0
    for rows in entry.parts:
        found.append((first, first + rows * width, (rows, width)))
        first += rows * width
    return found


def adjusted(shape: Sequence[int], rule: str | None) -> float:
    """The factor of a matrix's rate, by torch.optim.Muon's names for the rules."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _cost(shape: Sequence[int]) -> float:
    """Of products of a matrix with itself, up to a factor."""
    return float(math.prod(shape)) * min(shape, default=1)
