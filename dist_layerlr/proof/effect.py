"""The effect check: what a step really did to each parameter, against the plan's learning rate.

``verify`` proves what the optimizer reports. An optimizer that reports one rate and applies another
is caught here, from the update itself: ``before - after = lr * direction``, and the direction
follows from the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.optim.groups import OPTIMIZER, WEIGHT_DECAY, is_held
from dist_layerlr.optim.readback import factor_in_force, live_pieces, state_of
from dist_layerlr.optim.routed import parts_of
from dist_layerlr.optim.timed import step_of
from dist_layerlr.plan.entries import Plan
from dist_layerlr.proof.matrices import MatrixCheck
from dist_layerlr.ranks import Problem, any_rank, mismatch, together
from dist_layerlr.sharders import Piece, Pieces, Sharder, sharder_of
from dist_layerlr.sharders.base import local_gradient, sample
from dist_layerlr.sharders.distinct import alone_names

SAMPLES = 64
"""Elements looked at per piece: the check costs O(names), not O(elements)."""
TOLERANCE = 0.02
"""Relative error of an observed rate that is still rounding, in fp32."""
_ADAMS = frozenset({"Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam", "TableAdamW"})
"""Optimizers, and their subclasses, that move by Adam's formula; others (NAdam, RAdam) share its
state but not that."""


@contextmanager
def effect_check(
    plan: Plan, model: nn.Module, optimizer: Any = None, *, factor: float | None = None
) -> Iterator[dict[str, float]]:
    """Wrap one ``optimizer.step()`` or ``engine.step()``, compare rates. Collective at exit.

    Args:
        plan: of this model.
        model: as it is trained.
        optimizer: AdamW, Adam, SGD, torch's Muon among several; a DeepSpeed engine brings its own.
        factor: the schedule's multiplier that is in force. None: the one that the live groups are
            at when the block begins.

    Yields:
        {name: observed lr}, filled when the block ends. Names without a gradient, with an empty
        shard, or under an optimizer whose state does not give the direction are absent.

    Raises:
        PlanMismatch: on all ranks alike, when an observed rate is off by more than 2 % and
            rounding, or when no rank saw any parameter move in a known direction.
    """
    sharder = sharder_of(model)
    before = live_pieces(sharder, optimizer)
    multiplier = factor_in_force(before) if factor is None else factor
    matrices = MatrixCheck.of(plan, before, multiplier, alone_names(sharder, plan.entries))
    skipped, step = _skipped(model), step_of(before.optimizer)
    observed: dict[str, float] = {}
    with watched(sharder, optimizer, before, matrices) as look:
        yield observed
    rates, faults = matrices.after(live_pieces(sharder, optimizer))
    observed.update(rates)
    sights: list[Sight] = []
    with together(plan.digest) as problems:
        problems += faults
        problems += _missing(plan, before)
        sights += look()
        for sight in sights:
            entry = plan.entries.get(sight.name)
            if entry is None or sight.rate is None:
                continue
            wanted = entry.lr * multiplier if step is None else entry.lr_at(step, multiplier)
            if not sight.shows(wanted):
                continue  # Rounding of the weights hides the update.
            observed[sight.name] = sight.rate
            if sight.differs(wanted):
                text = f"{sight.name}: planned lr {wanted:.6g}, the step moved it at"
                problems.append(("effect", f"{text} {sight.rate:.6g}"))
    seen = bool(rates) or bool(matrices.gradients)
    seen = seen or any(sight.driven and sight.name in plan.entries for sight in sights)
    # DeepSpeed leaves out the steps in which a loss scale overflows.
    if _skipped(model) == skipped and not any_rank(seen):
        text = f"no step was seen of any of {len(plan.entries)} planned parameters"
        raise mismatch(0, [("unseen", text)], 1)


def _missing(plan: Plan, found: Pieces) -> list[Problem]:
    here = {piece.name for piece in found.pieces}
    problems: list[Problem] = []
    # A name of which a rank holds no element has a piece of none.
    for name in plan.entries:
        if name not in here:
            problems.append(("not stepped", f"{name}: not stepped by the optimizer"))
    return problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What one step did to one piece of a parameter."""

    name: str
    rate: float | None
    """Observed learning rate; None where the optimizer's direction is unknown."""
    slack: float = 0.0
    """How far rounding may move that rate."""
    share: float = TOLERANCE
    """Relative error that is still rounding, at the parameter's precision."""
    driven: bool = False
    """Whether the direction was other than zero, without which nothing moves."""

    def shows(self, wanted: float) -> bool:
        """Whether rounding leaves enough to compare with a rate. LR 0 is always observable."""
        return wanted <= 0 or self.slack <= 0.5 * wanted

    def differs(self, wanted: float) -> bool:
        """Whether the step went at another rate."""
        if self.rate is None:
            return False
        return abs(self.rate - wanted) > self.share * wanted + self.slack


@contextmanager
def watched(
    sharder: Sharder,
    optimizer: Any,
    before: Pieces,
    matrices: MatrixCheck | None = None,
    *,
    gradients: bool = True,
) -> Iterator[Callable[[], list[Sight]]]:
    """Watch one step of an optimizer on this rank, with or without a plan. Not collective.

    Args:
        sharder: of the model.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        before: what it holds, read before the step.
        matrices: those that are looked at whole, and not here; their gradients are taken for them.
        gradients: whether they may be read as the step begins; a closure makes them within it.

    Yields:
        What returns one sight per piece, once the block has ended.
    """
    elsewhere = {} if matrices is None else matrices.entries
    pieces = joined([p for p in before.pieces if p.numel and p.name not in elsewhere])
    weights = [_sample(p, p.owner) for p in pieces]
    with _gradients(pieces, matrices, before.optimizer if gradients else None) as taken:
        yield lambda: _sights(sharder, optimizer, pieces, weights, taken)


def _sights(
    sharder: Sharder,
    optimizer: Any,
    pieces: list[Piece],
    weights: list[Tensor],
    gradients: dict[int, Tensor],
) -> list[Sight]:
    sights: list[Sight] = []
    # The step may have replaced state entries: they are looked up anew, not remembered.
    stepped = sharder.pieces(optimizer).optimizer
    for piece, old in zip(pieces, weights, strict=True):
        direction = _direction(piece, stepped, old, gradients.get(id(piece)))
        if direction is None:
            sights.append(Sight(name=piece.name, rate=None))
            continue
        rate, slack = _rate(piece, old, direction)
        # Moments and update are rounded to the parameter's own precision, several times.
        share = TOLERANCE + 4 * torch.finfo(piece.owner.dtype).eps
        driven = bool(direction.any())
        sights.append(Sight(name=piece.name, rate=rate, slack=slack, share=share, driven=driven))
    return sights


def _skipped(model: nn.Module) -> int:
    return int(getattr(model, "skipped_steps", 0))


def joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces of one name that lie side by side in their owner, as one.

    An update does not care which elements of the whole they are.
    """
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if (
            last is not None
            and last.owner is piece.owner
            and last.name == piece.name
            and last.offset + last.numel == piece.offset
        ):
            found[-1] = replace(last, numel=last.numel + piece.numel)
        else:
            found.append(piece)
    return found


@contextmanager
def _gradients(
    pieces: list[Piece], matrices: MatrixCheck | None, optimizer: Any
) -> Iterator[dict[int, Tensor]]:
    """{id of a piece: gradient samples}, taken as the inner optimizer's step begins.

    Earlier they are not there: DeepSpeed hands gradients to its flat partitions inside the step.
    """
    taken: dict[int, Tensor] = {}
    if not isinstance(optimizer, torch.optim.Optimizer):
        yield taken
        return

    def take(*_: Any) -> None:
        if matrices is not None:
            matrices.take()
        for piece in pieces:
            if piece.owner.grad is not None:
                # A copy: the optimizer may decay or clip the gradient in place.
                taken[id(piece)] = _sample(piece, local_gradient(piece.owner)).clone()

    handle = optimizer.register_step_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


def _sample(piece: Piece, tensor: Tensor) -> Tensor:
    """Up to SAMPLES evenly spaced elements, float64, on the CPU."""
    return sample(piece.of(tensor), SAMPLES).double().cpu()


def _direction(piece: Piece, optimizer: Any, old: Tensor, gradient: Tensor | None) -> Tensor | None:
    """What the step multiplied by lr, from the state it left: AdamW, Adam, SGD.

    None where that is unknown.
    """
    group: dict[str, Any] = piece.group
    # A segmented optimizer holds the state, the one inside it the formula; of several inside it,
    # the one that the group belongs to.
    routed = parts_of(optimizer)
    formula = getattr(optimizer, "inner", optimizer)
    if routed is not None:
        formula = routed.parts[group[OPTIMIZER]]
    kinds = {c.__name__ for c in type(formula).__mro__}
    state = state_of(optimizer, piece)
    if group.get("maximize"):
        return None
    if is_held(group):
        # Any movement is one too many, whatever its direction.
        return torch.ones_like(old)
    if kinds & _ADAMS and "exp_avg_sq" in state:
        return _adam_direction(piece, optimizer, state, old)
    return _sgd_direction(piece, state, old, gradient) if "SGD" in kinds else None


def _sgd_direction(
    piece: Piece, state: dict[str, Any], old: Tensor, gradient: Tensor | None
) -> Tensor | None:
    group: dict[str, Any] = piece.group
    if state.get("momentum_buffer") is not None and not group.get("nesterov"):
        return _sample(piece, state["momentum_buffer"])
    if group.get("momentum") == 0 and gradient is not None:
        return gradient + float(group.get(WEIGHT_DECAY, 0.0)) * old
    return None


def _adam_direction(piece: Piece, optimizer: Any, state: dict[str, Any], old: Tensor) -> Tensor:
    group: dict[str, Any] = piece.group
    beta1, beta2 = group["betas"]
    # Adam's formula (Kingma and Ba 2015, algorithm 1) with the moments that the step has left.
    step = float(state["step"])
    first = _sample(piece, state["exp_avg"]) / (1 - beta1**step)
    second = _sample(piece, state.get("max_exp_avg_sq", state["exp_avg_sq"])) / (1 - beta2**step)
    direction: Tensor = first / (second.sqrt() + float(group["eps"]))
    decoupled = group.get("decoupled_weight_decay", getattr(optimizer, "adam_w_mode", True))
    return direction + float(group.get(WEIGHT_DECAY, 0.0)) * old if decoupled else direction


def _rate(piece: Piece, old: Tensor, direction: Tensor) -> tuple[float, float]:
    """Least-squares rate of ``old - new = rate * direction``, and how far rounding may move it."""
    new = _sample(piece, piece.owner)
    power = float(direction.square().sum())
    if power == 0.0:
        return 0.0, float("inf")
    rate = float(((old - new) * direction).sum()) / power
    # The stored weight is rounded to its own precision: bf16 keeps three digits, fp32 seven.
    rounding = torch.finfo(piece.owner.dtype).eps * old.abs()
    return rate, float((rounding * direction.abs()).sum()) / power
