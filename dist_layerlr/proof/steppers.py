"""Which algorithm steps each name, and in which precision it keeps its state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dist_layerlr.optim.routed import parts_of
from dist_layerlr.plan.entries import Plan
from dist_layerlr.ranks import Problem
from dist_layerlr.sharders import Pieces
from dist_layerlr.sharders.base import ParamGroup

_USE_MUON = "use_muon"
"""Key in the groups of optimizers that hold Muon and AdamW in one, DeepSpeed's among them."""
_COUNTERS = frozenset({"step", "steps", "t", "k"})


def algorithms(found: Pieces) -> dict[str, str]:
    """{name: class of what steps it}, read off the live optimizer, whoever built it."""
    routed = parts_of(found.optimizer)
    if routed is None:
        inner = getattr(found.optimizer, "inner", None) or found.optimizer
        kind = type(inner).__name__
        return {piece.name: _in_one(piece.group, kind) for piece in found.pieces}
    called = labels(found) or {}
    # A group of no part is stepped by nobody, whatever it says of itself.
    return {
        name: routed.kind_of(own) if own in routed.parts else own for name, own in called.items()
    }


def labels(found: Pieces) -> dict[str, str] | None:
    """{name: what the plan calls that which really steps it}; None: one optimizer for all."""
    routed = parts_of(found.optimizer)
    if routed is None:
        return None
    # The group says what the plan calls it; whose it really is, the parts say.
    label_of: dict[int, str] = {}
    for label, part in routed.parts.items():
        label_of.update(dict.fromkeys(map(id, part.param_groups), label))
    return {p.name: label_of.get(id(p.group), "nothing") for p in found.pieces}


def stepper_problems(plan: Plan, found: Pieces) -> list[Problem]:
    """Names that another optimizer steps than the plan says. Not collective."""
    if plan.config.optimizers is None:
        return []
    live, kinds = labels(found), algorithms(found)
    # What nobody steps at all is told by verify itself.
    problems: list[Problem] = []
    for name, entry in plan.entries.items():
        if name not in kinds or entry.optimizer is None:
            continue
        # Of an optimizer that nobody attached only the class is known: its name must be the plan's.
        same = live[name] == entry.optimizer if live else _means(entry.optimizer, kinds[name])
        if not same:
            text = f"{name}: planned for {entry.optimizer}, stepped by {kinds[name]}"
            problems.append(("optimizer", text))
    return problems


def by_algorithm(found: Pieces) -> dict[str, int]:
    """{class: names that it steps}."""
    return dict(sorted(Counter(algorithms(found).values()).items()))


def state_precision(found: Pieces) -> dict[str, str]:
    """{name: dtype of its state}; a name is absent before its first step.

    Quantised state has a tensor class of its own, or a dtype of integers with scales beside it.
    """
    states: Mapping[Any, Mapping[str, Any]] = getattr(found.optimizer, "state", {})
    routed = parts_of(found.optimizer)
    of_owner: dict[int, dict[str, str]] = {}
    precision: dict[str, str] = {}
    for piece in found.pieces:
        owner = id(piece.owner)
        # Many names share a flat tensor: its state is looked at once.
        if owner not in of_owner:
            held = states.get(piece.owner, {})
            of_owner[owner] = {key: _dtype(v) for key, v in held.items() if _is_moment(key, v)}
        kinds: set[str] = set()
        for key, kind in of_owner[owner].items():
            if routed is None or routed.takes(piece.group["optimizer"], key):
                kinds.add(kind)
        # Scales of quantised state are floats; what is quantised tells the precision.
        narrow = {kind for kind in kinds if not kind.startswith(("float", "bfloat"))}
        if piece.numel and kinds:
            precision[piece.name] = "+".join(sorted(narrow or kinds))
    return precision


def _is_moment(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and key not in _COUNTERS


def _dtype(value: Tensor) -> str:
    local = getattr(value, "_local_tensor", value)
    if type(local) not in (Tensor, nn.Parameter):
        return type(local).__name__
    return str(local.dtype).removeprefix("torch.")


def _in_one(group: ParamGroup, kind: str) -> str:
    if _USE_MUON not in group:
        return kind
    return "Muon" if group[_USE_MUON] else "AdamW"


def _means(label: str, kind: str) -> bool:
    """Whether a class is what the plan's label says: ``adamw`` is AdamW, FusedAdam its twin."""
    label, kind = label.lower(), kind.lower()
    return label in kind or (label == "adamw" and kind in ("fusedadam", "deepspeedcpuadam"))
