"""What only a look at values shows: copies agree across ranks, and steps were counted once."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import Tensor, nn

from dist_layerlr.errors import LayerLRError
from dist_layerlr.optim.readback import state_of
from dist_layerlr.optim.timed import step_of
from dist_layerlr.ranks import Problem, alike, everyone
from dist_layerlr.sharders import Pieces, Sharder
from dist_layerlr.sharders.base import HeldSpan
from dist_layerlr.sharders.distinct import distinct_names
from dist_layerlr.sharders.replicas import differing

_COUNTERS = ("step", "steps", "t", "k")
"""Names by which optimizers count; what they call otherwise is not compared."""


def deep_problems(
    model: nn.Module, sharder: Sharder, found: Pieces, steps: int | None
) -> list[Problem]:
    """Compare replicas and step counters over all ranks. Collective; the same on all ranks.

    Args:
        model: as it is trained.
        sharder: of the model.
        found: what this rank steps.
        steps: optimizer steps done, which no counter may exceed; None: unknown.
    """
    problems: list[Problem] = []
    apart = distinct_names(model, found.requires_grad)
    for difference in differing(alike(lambda: _copies(sharder, found, apart))):
        problems.append(("replica", difference.found))
    return problems + _step_problems(found, steps, apart)


def _copies(sharder: Sharder, found: Pieces, apart: Set[str]) -> list[HeldSpan]:
    """What other ranks hold as well: parameters, and fp32 masters where an engine keeps them."""
    try:
        weights = sharder.weights()
    except LayerLRError:
        # Weights in another memory order cannot be listed as runs; they train all the same.
        weights = []
    copies: list[HeldSpan] = []
    seen: set[int] = set()
    for weight in weights:
        # Running statistics in buffers differ by rank, and may.
        if weight.replicas > 1 and weight.name not in apart and not weight.is_buffer:
            copies.append(weight)
            seen.add(weight.tensor.data_ptr())
    for piece in found.pieces:
        if piece.replicas == 1 or piece.name in apart or not piece.numel:
            continue
        tensor = piece.of(piece.owner)
        # Outside DeepSpeed what is stepped is the weight itself, which is in already.
        if tensor.data_ptr() not in seen and sharder.layout.engine_steps:
            name = f"{piece.name} (fp32 master)"
            copies.append(HeldSpan(name=name, start=piece.start, numel=piece.numel, tensor=tensor))
    return copies


def _step_problems(found: Pieces, steps: int | None, apart: Set[str]) -> list[Problem]:
    """Counters of one name are alike on all ranks; none is ahead of the steps that were done.

    One that is behind belongs to a name that had no gradient in some steps (an expert), or that is
    trained since later.
    """
    by_rank = everyone(_counters(found))
    problems: list[Problem] = []
    counted: dict[str, float] = {}
    for rank, counters in enumerate(by_rank):
        for name, count in counters.items():
            if counted.setdefault(name, count) != count and name not in apart:
                first = next(r for r, other in enumerate(by_rank) if name in other)
                text = (
                    f"{name}: {count:g} steps counted on rank {rank},"
                    f" {counted[name]:g} on rank {first}"
                )
                problems.append(("steps", text))
    for name, count in counted.items():
        if steps is not None and count > steps:
            problems.append(("steps", f"{name}: {count:g} steps counted, {steps} done"))
    return problems


def _counters(found: Pieces) -> dict[str, float]:
    """{name: steps that the optimizer has counted for it on this rank}."""
    counters: dict[str, float] = {}
    state: Any = getattr(found.optimizer, "state", {})
    apart = step_of(found.optimizer) is not None
    # One owner may have many pieces; a counter on the device is read once, unless names start at
    # steps of their own.
    of_owner: dict[int, float | None] = {}
    for piece in found.pieces:
        owner = id(piece.owner)
        if apart:
            of_owner[owner] = _counter(state_of(found.optimizer, piece))
        elif owner not in of_owner:
            of_owner[owner] = _counter(state.get(piece.owner, {}))
        count = of_owner[owner]
        if count is not None and piece.numel:
            counters[piece.name] = count
    return counters


def _counter(held: Any) -> float | None:
    for key in _COUNTERS:
        value = held.get(key)
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
    return None
