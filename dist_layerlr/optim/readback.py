"""Read the live optimizer: which group steps which name, at which rate, with which state."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from dist_layerlr.optim.groups import (
    EPS,
    INITIAL_LR,
    LR,
    OPTIMIZER,
    STEP,
    TIMING,
    UNKNOWN,
    WEIGHT_DECAY,
)
from dist_layerlr.optim.routed import parts_of
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.optim.timed import step_of
from dist_layerlr.sharders import Piece, Pieces, Sharder, sharder_of


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveParam:
    """How this rank's optimizer trains one parameter."""

    lr: float
    weight_decay: float
    numel: int
    """Elements that this rank steps; 0 for an empty shard."""
    replicas: int = 1
    """Number of ranks that step each element."""
    initial_lr: float | None = None
    """What a schedule multiplies; None where no schedule was ever built on the group."""
    eps: object = None
    """Adam's epsilon; None where the optimizer has none, a tuple in some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpan:
    """Optimizer state of one span of a parameter."""

    start: int
    """First element in the flattened, unsharded parameter."""
    tensors: Mapping[str, Tensor]
    """State by key: flat tensors as long as the span, or scalars (``step``)."""


def live_pieces(sharder: Sharder, optimizer: Any = None) -> Pieces:
    """What is really stepped, with the groups whose rates are in force.

    A segmented optimizer's outer group holds no planned rate: its inner groups do, and only bound
    slices are stepped.
    """
    found = sharder.pieces(optimizer)
    if not isinstance(found.optimizer, Segmented) or found.optimizer.inner is None:
        return found
    segmented = found.optimizer
    groups = segmented.groups_by_name()
    pieces = [
        piece.piece(groups[piece.name], piece.replicas)
        for piece in found.pieces
        if piece.name in groups and (segmented.steps(piece) or not piece.numel)
    ]
    return replace(found, pieces=pieces)


def read_back(model: nn.Module, optimizer: Any = None) -> dict[str, LiveParam]:
    """{canonical name: lr, weight decay, local elements} of this rank, read from live groups."""
    return live_params(live_pieces(sharder_of(model), optimizer))


def optimizer_state(model: nn.Module, optimizer: Any = None) -> dict[str, list[StateSpan]]:
    """{canonical name: this rank's optimizer state}, wherever the sharder keeps it.

    Never runs a step to create it.

    Tensors are views where the layout allows; a name is absent before its first step.
    """
    found = live_pieces(sharder_of(model), optimizer)
    routed = parts_of(found.optimizer)
    result: dict[str, list[StateSpan]] = {}
    for piece in found.pieces:
        tensors = {
            key: value if value.ndim == 0 else piece.of(value)
            for key, value in state_of(found.optimizer, piece).items()
            if isinstance(value, Tensor)
            and (routed is None or routed.takes(piece.group[OPTIMIZER], key))
        }
        if tensors:
            result.setdefault(piece.name, []).append(StateSpan(start=piece.start, tensors=tensors))
    return result


def state_of(optimizer: Any, piece: Piece) -> dict[str, Any]:
    """The state of a piece's owner, with the step counter that is the piece's own."""
    held: dict[str, Any] = {} if optimizer is None else optimizer.state.get(piece.owner, {})
    return optimizer.counters_of(piece, held) if isinstance(optimizer, Segmented) else held


def live_params(found: Pieces) -> dict[str, LiveParam]:
    """{canonical name: live rate, weight decay, local elements}.

    Pieces of one name are added up.
    """
    live: dict[str, LiveParam] = {}
    # Thousands of names share few groups, and some keep their rates on the device.
    read: dict[int, tuple[float, float, float | None]] = {}
    for piece in found.pieces:
        group = piece.group
        if id(group) not in read:
            initial = group.get(INITIAL_LR)
            known = None if initial is None else float(initial)
            read[id(group)] = float(group[LR]), float(group.get(WEIGHT_DECAY, 0.0)), known
        lr, weight_decay, initial_lr = read[id(group)]
        before = live.get(piece.name)
        live[piece.name] = LiveParam(
            lr=lr,
            weight_decay=weight_decay,
            numel=piece.numel + (before.numel if before else 0),
            replicas=piece.replicas,
            initial_lr=initial_lr,
            eps=group.get(EPS),
        )
    return live


def factor_in_force(found: Pieces) -> float:
    """The schedule's multiplier that the live groups are at: ``lr`` over ``initial_lr``.

    Groups without an ``initial_lr`` are driven by no schedule, and a rate of 0 tells nothing: they
    count as 1. Where groups disagree, which one multiplier cannot explain, this is the multiplier
    of most names; a comparison with the plan then names the others.
    """
    if isinstance(found.optimizer, Segmented) and step_of(found.optimizer) is not None:
        # Rates of a plan with timings are at several multiples; the outer group's is the run's.
        return found.optimizer.factor
    votes: Counter[str] = Counter()
    exact: dict[str, float] = {}
    # A name has one vote, in however many pieces this rank holds it.
    for piece in {piece.name: piece for piece in found.pieces}.values():
        initial = piece.group.get(INITIAL_LR)
        if initial is not None and float(initial) <= 0.0:
            continue
        # Timings multiply rates besides: only what has none tells of the run's schedule.
        if TIMING in piece.group and piece.group.get(STEP, UNKNOWN) != UNKNOWN:
            continue
        factor = 1.0 if initial is None else float(piece.group[LR]) / float(initial)
        # Some optimizers keep their rate as a float32 tensor: six equal digits are the same vote.
        bucket = f"{factor:.6g}"
        votes[bucket] += 1
        exact.setdefault(bucket, factor)
    return exact[votes.most_common(1)[0][0]] if votes else 1.0


def repeated(found: Pieces) -> list[str]:
    """Names with two pieces that overlap: stepped twice."""
    pieces_of = Counter(piece.name for piece in found.pieces)
    spans: dict[str, list[tuple[int, int]]] = {}
    for piece in found.pieces:
        if pieces_of[piece.name] > 1:
            span = (piece.start, piece.start + piece.numel)
            spans.setdefault(piece.name, []).append(span)
    twice: list[str] = []
    for name, held in spans.items():
        # Two equal empty spans, too, are two groups that hold one parameter.
        doubled = len(set(held)) < len(held)
        # In the order of their starts, spans that overlap have neighbours that do.
        full = sorted(span for span in held if span[1] > span[0])
        if doubled or any(now[0] < before[1] for before, now in itertools.pairwise(full)):
            twice.append(name)
    return twice
