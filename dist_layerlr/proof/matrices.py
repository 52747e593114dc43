"""The effect of an optimizer that orthogonalises: what a step really did to whole matrices.

Two looks at ``before - after``. Its singular values must be those of an orthogonal factor times the
planned rate: this asks nothing of the optimizer. And where its momentum can be read, the factor is
computed again from it, and tells the rate as exactly as for AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dist_layerlr.optim.exchange import Exchange, Held, Schedule
from dist_layerlr.optim.groups import WEIGHT_DECAY
from dist_layerlr.optim.orthogonal import orthogonalise
from dist_layerlr.optim.routed import Routed, parts_of
from dist_layerlr.optim.whole import MOMENTUM, MuonSlices, adjusted, rows_of
from dist_layerlr.plan.entries import Plan, PlanEntry
from dist_layerlr.ranks import Problem, alike, everyone, rank
from dist_layerlr.sharders import Piece, Pieces
from dist_layerlr.sharders.base import ParamGroup, local_gradient

LOW, HIGH = 0.5, 1.5
"""Newton-Schulz of torch.optim.Muon ends here: its coefficients are chosen for speed, not for 1."""
ROWS = 512
"""Of the short side that singular values are computed of. Those of some rows of a matrix lie
between its smallest and its largest."""
_TOLERANCE = 0.02
ROUNDING = "rounding"
"""Key of the settings: by how much a stored weight of a matrix is rounded, on average."""


@dataclass(kw_only=True)
class MatrixCheck:
    """The matrices of a plan that are to be orthogonalised, before and after a step."""

    entries: Mapping[str, PlanEntry]
    pieces: list[Piece]
    """Of these matrices, on this rank."""
    factor: float
    """Schedule multiplier."""
    alone: frozenset[str] = frozenset()
    """Names of which each rank has a tensor of its own."""
    weights: list[Tensor] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    """{number of a piece: its gradient}, if the step had one."""

    @classmethod
    def of(
        cls, plan: Plan, found: Pieces, factor: float, alone: frozenset[str] = frozenset()
    ) -> MatrixCheck:
        """Copy the weights as they are before the step.

        Args:
            plan: of the model.
            found: what the optimizer holds.
            factor: schedule multiplier.
            alone: names of which each rank has a tensor of its own.
        """
        routed = parts_of(found.optimizer)
        entries: dict[str, PlanEntry] = {}
        for name, entry in plan.entries.items():
            if _orthogonalises(plan, entry, routed):
                entries[name] = entry
        pieces = [p for p in found.pieces if p.name in entries and p.numel]
        check = cls(entries=entries, pieces=pieces, factor=factor, alone=alone)
        check.weights = [piece.of(piece.owner).clone() for piece in pieces]
        return check

    def take(self) -> None:
        """Copy gradients, as the step begins."""
        for number, piece in enumerate(self.pieces):
            if piece.owner.grad is not None:
                self.gradients[number] = piece.of(local_gradient(piece.owner)).clone()

    def after(self, found: Pieces) -> tuple[dict[str, float], list[Problem]]:
        """({name: observed rate} of the matrices that this rank put together, problems).

        Collective.
        """
        if not self.entries:
            return {}, []
        held: dict[str, list[tuple[int, int]]] = {}
        for piece in self.pieces:
            held.setdefault(piece.name, []).append((piece.start, piece.numel))
        moves, directions = alike(lambda: self._parts(found))
        # A rank may put a matrix together of which it holds nothing: it needs the settings, too.
        groups: dict[str, ParamGroup] = {}
        here = {p.name: _settings(p) for p in found.pieces if p.numel and p.name in self.entries}
        for row in everyone(here):
            for name, told in row.items():
                known = groups.setdefault(name, told)
                known[ROUNDING] = max(known[ROUNDING], told[ROUNDING])
        observed: dict[str, float] = {}
        problems: list[Problem] = []
        # Two tensors of one name must never meet.
        for exchange in (
            self._exchange(everyone(held), rank(), self.entries.keys() - self.alone),
            self._exchange([held], 0, self.entries.keys() & self.alone),
        ):
            problems += self._compare(exchange, moves, directions, groups, observed)
        return observed, problems

    def _exchange(self, table: Sequence[Held], me: int, names: Set[str]) -> Exchange:
        sizes = {name: entry.numel for name, entry in self.entries.items() if name in names}
        costs = {name: float(size) for name, size in sizes.items()}
        return Exchange(table=table, me=me, sizes=sizes, costs=costs)

    def _compare(
        self,
        exchange: Exchange,
        moves: _Flat,
        directions: _Flat,
        groups: Mapping[str, ParamGroup],
        observed: dict[str, float],
    ) -> list[Problem]:
        problems: list[Problem] = []
        # Ranks without an element of a matrix take part in its exchange: they are asked, too.
        names = exchange.agreed({self.pieces[number].name for number in self.gradients})
        # Where ranks differ in what they can read, none of them sends it.
        readable = set(exchange.agreed(directions)) & set(names)
        for schedule in exchange.rounds(names):
            whole = exchange.gather(schedule, moves, torch.float32)
            asked = _only(schedule, readable)
            factors = exchange.gather(asked, directions, torch.bfloat16)
            for name, move in whole.items():
                entry, group = self.entries[name], groups[name]
                problems += self._singular(entry, move, group)
                if name in factors:
                    rate, slack = _rate(entry, move, factors[name], group)
                    wanted = entry.lr * self.factor
                    # What is held still is not rounded either. Of weights of 16 bits a small step
                    # may be nothing but rounding.
                    if wanted == 0.0 or slack <= 0.5 * wanted:
                        problems += self._off(entry, rate, slack if wanted else 0.0)
                        observed[name] = rate
        return problems

    def _parts(self, found: Pieces) -> tuple[_Flat, _Flat]:
        """What the step moved, decay taken off; and what it is to have orthogonalised."""
        moves: _Flat = {}
        directions: _Flat = {}
        state = found.optimizer.state
        for number, (piece, old) in enumerate(zip(self.pieces, self.weights, strict=True)):
            gradient = self.gradients.get(number)
            if gradient is None:
                continue
            lr = self.entries[piece.name].lr * self.factor
            decayed = old.float() * (1.0 - lr * float(piece.group.get(WEIGHT_DECAY, 0.0)))
            move = decayed - piece.of(piece.owner).float()
            moves.setdefault(piece.name, []).append((piece.start, move))
            momentum = state.get(piece.owner, {}).get(MOMENTUM)
            if momentum is not None:
                now = piece.of(momentum)
                if piece.group["nesterov"]:
                    now = gradient.lerp(now, piece.group["momentum"])
                # A copy: what is orthogonalised is used up, and this may be the momentum itself.
                row = (piece.start, now.to(torch.bfloat16, copy=True))
                directions.setdefault(piece.name, []).append(row)
        return moves, directions

    def _singular(self, entry: PlanEntry, move: Tensor, group: ParamGroup) -> list[Problem]:
        lr = entry.lr * self.factor
        if not move.isfinite().all():
            # Here, because a decomposition raises on the rank that owns the matrix, while others
            # wait for it.
            return [("effect", f"{entry.name}: the step moved it to what is NaN or infinite")]
        if lr == 0.0 or not move.any():
            return []
        for first, last, shape in rows_of(entry):
            part = move[first:last].view(shape)
            wide = part.T if shape[0] > shape[1] else part
            step = -(-wide.shape[0] // ROWS)
            largest = float(torch.linalg.matrix_norm(wide[::step].float(), ord=2))
            # torch scales a rate by the matrix's shape: what is left of it is about 1.
            largest /= lr * adjusted(shape, group.get("adjust_lr_fn"))
            # Of some rows alone the largest may be small: the gradient has a low rank.
            if largest > HIGH or (step == 1 and largest < LOW):
                text = (
                    f"{entry.name}: planned for {entry.optimizer}, but the step is not orthogonal:"
                    f" its largest singular value is {largest:.3g} x the planned rate, Muon's lie"
                    f" in [{LOW}, {HIGH}]"
                )
                return [("effect", text)]
        return []

    def _off(self, entry: PlanEntry, rate: float, slack: float) -> list[Problem]:
        wanted = entry.lr * self.factor
        if abs(rate - wanted) <= _TOLERANCE * wanted + slack + 1e-12:
            return []
        text = f"{entry.name}: planned lr {wanted:.6g}, the step moved it at {rate:.6g}"
        return [("effect", text)]


_Flat = dict[str, list[tuple[int, Tensor]]]


def _orthogonalises(plan: Plan, entry: PlanEntry, routed: Routed | None) -> bool:
    if entry.optimizer is None or plan.config.optimizers is None:
        return False
    if routed is not None and entry.optimizer in routed.parts:
        return isinstance(routed.parts[entry.optimizer], MuonSlices)
    # Somebody else's optimizer: the plan's name for it is all there is.
    return "muon" in entry.optimizer.lower() and len(entry.shape) == 2


def _only(schedule: Schedule, names: set[str]) -> Schedule:
    sizes = {name: size for name, size in schedule.sizes.items() if name in names}
    return replace(schedule, sizes=sizes)


def _settings(piece: Piece) -> ParamGroup:
    """What the others need to know of a matrix, of which they may hold nothing."""
    kept = ("adjust_lr_fn", "ns_coefficients", "eps", "ns_steps")
    found = {key: piece.group[key] for key in kept if key in piece.group}
    weight = piece.of(piece.owner)
    rounding = torch.finfo(weight.dtype).eps * float(weight.detach().abs().mean())
    return {**found, ROUNDING: rounding}


def _rate(
    entry: PlanEntry, move: Tensor, direction: Tensor, group: ParamGroup
) -> tuple[float, float]:
    """Least-squares rate of a matrix along its orthogonal factor, and how far rounding moves it."""
    (found,) = orthogonalise([(direction.view(entry.shape), entry.parts, group)])
    factor = found.reshape(-1).double()
    for first, last, shape in rows_of(entry):
        factor[first:last] *= adjusted(shape, group.get("adjust_lr_fn"))
    # In double: a million products of bf16 factors lose more digits than the bar has.
    power = float(factor.square().sum())
    if not power:
        return 0.0, 0.0
    slack = float(group[ROUNDING]) * float(factor.abs().sum()) / power
    return float((move.double() * factor).sum()) / power, slack
