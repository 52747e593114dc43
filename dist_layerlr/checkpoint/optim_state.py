"""Optimizer state in a load: read in place where it exists, else created without a step.

``plan_state`` matches and refuses; it changes nothing. ``prepare_state`` makes room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.checkpoint.dcp import Scalars, StoredSpan, sizes
from dist_layerlr.checkpoint.index import OPTIM, WEIGHT, Index, dtype_named
from dist_layerlr.checkpoint.live import Live, piece_span
from dist_layerlr.checkpoint.manifest import Manifest
from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.optim.fused import STEP
from dist_layerlr.optim.groups import AVERAGE, OPTIMIZER
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.sharders import Piece
from dist_layerlr.sharders.base import local

_SAME = dict.fromkeys(("Adam", "DeepSpeedCPUAdam", "FusedAdam", "TableAdamW"), "AdamW")
"""Optimizers whose state means the same."""
_FLAGS = {"amsgrad": "max_exp_avg_sq", "centered": "grad_avg"}
"""Settings of a group that need a state tensor of their own, which torch makes in a parameter's
first step only."""
Number = tuple[float, str | None]
"""(value, dtype of the tensor that held it, or None for a plain number)."""
Dtypes = Mapping[str, torch.dtype | None]
"""{state key: dtype; None: as the parameter's}."""


@dataclass(frozen=True, kw_only=True)
class OwnerState:
    """What the checkpoint has for one tensor that the optimizer steps."""

    pieces: list[Piece]
    """Of the tensor, on this rank."""
    sources: Sequence[Dtypes]
    """For each piece; empty where the checkpoint has no state for it."""
    saved_names: list[str | None]
    numbers: Mapping[str, Number]
    """Step counters."""
    apart: Mapping[int, float] | None = None
    """{first element of a piece in the owner: its steps}, where each name counts its own."""

    @property
    def keys(self) -> Dtypes:
        """State keys of all pieces."""
        merged: dict[str, torch.dtype | None] = {}
        for source in self.sources:
            merged |= source
        return merged


def plan_state(live: Live, manifest: Manifest, index: Index) -> list[OwnerState]:
    """Match saved optimizer state with live tensors. Nothing is changed.

    Raises:
        CheckpointError: another optimizer, or one that keeps more state; or parameters that share a
            live tensor, hence a step counter, disagree on it.
    """
    if not live.steppers and not manifest.optimizers:
        _check_class(manifest.optimizer, live.optimizer_class)
    elementwise = _saved_state(index)
    numbers: Scalars = index.metadata.planner_data or {}
    planned = []
    for pieces in _by_owner(live.found.pieces):
        # An empty shard has no state that could be filled.
        if not local(pieces[0].owner).numel():
            continue
        saved = [_saved_name(piece, live, manifest) for piece in pieces]
        sources: list[Dtypes] = []
        counters: dict[str, Mapping[str, Number]] = {}
        frozen: list[str] = []
        restarted: list[str] = []
        for piece, name in zip(pieces, saved, strict=True):
            was_stepped = name is not None and manifest.parameters[name].trainable
            if was_stepped and not _same_stepper(piece.name, str(name), live, manifest):
                # Moments of one algorithm mean nothing to another.
                sources.append({})
                restarted.append(piece.name)
                continue
            source = elementwise.get(name or "", {})
            _check_flags(piece, source)
            sources.append(source)
            if name is not None and name in numbers:
                counters[name] = numbers[name]
            if name is not None and not manifest.parameters[name].trainable:
                frozen.append(name)
        apart = _apart(pieces, saved, counters, live)
        if apart is None:
            _check_unfrozen(frozen, counters)
            _check_restarted(restarted, counters, live)
        planned.append(
            OwnerState(
                pieces=pieces,
                sources=sources,
                saved_names=saved,
                numbers=_agreed(counters) if apart is None else _any_of(counters),
                apart=apart,
            )
        )
    return planned


def prepare_state(
    planned: Iterable[OwnerState], live: Live, manifest: Manifest
) -> list[StoredSpan]:
    """Give every stepped tensor the state tensors and counters of the checkpoint.

    Returns:
        The spans to be read.
    """
    spans: list[StoredSpan] = []
    same_class = manifest.optimizer == live.optimizer_class
    for state in planned:
        owner = state.pieces[0].owner
        held = live.found.optimizer.state[owner]
        # State that the checkpoint does not have is of a past that did not happen.
        for key in held.keys() - state.keys.keys():
            del held[key]
        for key, dtype in state.keys.items():
            # Whoever keeps no average of weights leaves it on the disk.
            if key == AVERAGE and key not in held:
                continue
            held[key] = _room(held.get(key), owner, dtype)
            # Under flat sharders one tensor holds the state of many names. Where the checkpoint
            # lacks it for some of them, they start with zero moments.
            # An average goes on from their weights instead, which it holds already.
            if key != AVERAGE and not all(key in source for source in state.sources):
                local(held[key]).zero_()
            spans += _state_spans(state, key, held[key], live)
        for key, number in state.numbers.items():
            piece = next(piece for piece in state.pieces if live.is_own(piece, key))
            held[key] = _number(key, number, piece, live, same_class)
            if state.apart is not None and key == STEP:
                row = live.found.optimizer.row_of(piece)
                held[key] = row.counters(state.apart, held[key])
    return spans


def _state_spans(state: OwnerState, key: str, tensor: Tensor, live: Live) -> list[StoredSpan]:
    """Where the saved values of one state key go in a tensor that is laid out as the owner."""
    spans: list[StoredSpan] = []
    for piece, source, saved in zip(state.pieces, state.sources, state.saved_names, strict=True):
        if key in source and piece.numel:
            spans.append(piece_span(f"{OPTIM}.{saved}.{key}", piece, tensor, live.size(piece.name)))
    return spans


def without_state(planned: Iterable[OwnerState]) -> list[str]:
    """Names that the checkpoint has no optimizer state for, though it has some for others."""
    fresh: dict[str, None] = {}
    any_state = False
    for state in planned:
        for piece, source in zip(state.pieces, state.sources, strict=True):
            if source:
                any_state = True
            else:
                fresh[piece.name] = None
    # A checkpoint without any state is one of step 0, or of an optimizer that keeps none.
    return list(fresh) if any_state else []


def _saved_state(index: Index) -> dict[str, dict[str, torch.dtype | None]]:
    """{name: its state}.

    State in the dtype of its weight follows the live parameter's dtype, which torch steps it with.
    """
    stored = sizes(index.metadata)
    found: dict[str, dict[str, torch.dtype | None]] = {}
    for key, (_, dtype) in stored.items():
        kind, _, rest = key.partition(".")
        if kind == OPTIM:
            name, _, leaf = rest.rpartition(".")
            as_weight = dtype == stored[f"{WEIGHT}.{name}"][1]
            found.setdefault(name, {})[leaf] = None if as_weight else dtype
    return found


def _check_flags(piece: Piece, source: Dtypes) -> None:
    for flag, key in _FLAGS.items():
        if source and piece.group.get(flag) and key not in source:
            raise CheckpointError(
                f"The live optimizer has {flag}=True, but the checkpoint has no {key} of"
                f" {piece.name}: it was trained without. Set {flag}=False."
            )


def _check_class(saved: str, live: str) -> None:
    if _SAME.get(saved, saved) != _SAME.get(live, live):
        raise CheckpointError(
            f"The checkpoint was trained with {saved}, the live optimizer is {live}. Use {saved}."
        )


def _saved_name(piece: Piece, live: Live, manifest: Manifest) -> str | None:
    return manifest.name_of(piece.name, live.by_name[piece.name].aliases)


def _check_unfrozen(frozen: list[str], counters: Mapping[str, Mapping[str, Number]]) -> None:
    """Refuse a name that has no step counter of its own beside names that have one.

    Adam divides by 1 - beta**step. A parameter with empty moments that shares the counter of
    parameters at step 1,000 gets no bias correction, so its first updates are
    (1 - beta1) / sqrt(1 - beta2), about 3 times, too large.
    """
    if frozen and counters:
        beside = next(iter(counters))
        raise CheckpointError(
            f"{frozen[0]} was frozen and has no step counter, but this sharder steps it in one"
            f" tensor with {beside}, which has one. Resume under DDP or FSDP2, or start anew from"
            " the exported weights."
        )


def _same_stepper(name: str, saved: str, live: Live, manifest: Manifest) -> bool:
    before, now = manifest.stepper_of(saved), live.steppers.get(name, live.optimizer_class)
    return _SAME.get(before, before) == _SAME.get(now, now)


def restarted(live: Live, manifest: Manifest) -> list[str]:
    """What to tell of names that another optimizer stepped when they were saved."""
    changed: dict[tuple[str, str], list[str]] = {}
    if live.steppers or manifest.optimizers:
        for name in dict.fromkeys(piece.name for piece in live.found.pieces):
            weight = live.by_name.get(name)
            saved = manifest.name_of(name, weight.aliases if weight is not None else ())
            if saved is None or not manifest.parameters[saved].trainable:
                continue
            if not _same_stepper(name, saved, live, manifest):
                now = live.steppers.get(name, live.optimizer_class)
                changed.setdefault((manifest.stepper_of(saved), now), []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: stepped by {old}"
        f" before, by {new} now; optimizer state starts fresh"
        for (old, new), names in changed.items()
    ]


def _check_restarted(
    restarted: list[str], counters: Mapping[str, Mapping[str, Number]], live: Live
) -> None:
    """As ``_check_unfrozen``, for a name that comes to an optimizer that counts steps."""
    counting = {live.steppers.get(name, live.optimizer_class) for name in counters}
    for name in restarted:
        if live.steppers.get(name, live.optimizer_class) in counting:
            raise CheckpointError(
                f"{name} was stepped by another optimizer and has no step counter, but this sharder"
                f" steps it in one tensor with {next(iter(counters))}, which has one. Resume under"
                " DDP or FSDP2, or leave it to the optimizer that stepped it."
            )


def _agreed(numbers: Mapping[str, Mapping[str, Number]]) -> Mapping[str, Number]:
    """Counters that hold for a whole tensor."""
    if not numbers:
        return {}
    first = next(iter(numbers))
    wanted = _values(numbers[first])
    for name, values in numbers.items():
        if _values(values) != wanted:
            raise CheckpointError(
                f"{first} and {name} were saved with {dict(numbers[first])} and {dict(values)}, but"
                " this sharder steps them in one tensor with one counter. Resume under the sharder"
                " that saved them."
            )
    return numbers[first]


def _apart(
    pieces: list[Piece],
    saved: list[str | None],
    counters: Mapping[str, Mapping[str, Number]],
    live: Live,
) -> Mapping[int, float] | None:
    """{offset of a piece: its steps}, where the live tensor counts for each name; else None.

    Raises:
        CheckpointError: names that are stepped as one have counted differently.
    """
    optimizer = live.found.optimizer
    row = optimizer.row_of(pieces[0]) if isinstance(optimizer, Segmented) else None
    if row is None or not row.apart or not any(STEP in own for own in counters.values()):
        return None
    at: dict[int, float] = {}
    for piece, name in zip(pieces, saved, strict=True):
        if piece.numel:
            own = counters.get(name or "", {})
            at[piece.offset] = own[STEP][0] if STEP in own else 0.0
    try:
        row.counters(at, None)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    return at


def _any_of(numbers: Mapping[str, Mapping[str, Number]]) -> Mapping[str, Number]:
    """The kinds of counters that there are; their values are set name by name."""
    return next(iter(numbers.values()))


def _values(numbers: Mapping[str, Number]) -> dict[str, float]:
    """Without dtypes: sharders may hold one counter in tensors of different dtypes."""
    return {key: value for key, (value, _) in numbers.items()}


def _room(held: Any, owner: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The state tensor that is there, or a new one laid out as the owner."""
    if isinstance(held, Tensor) and local(held).numel() == local(owner).numel():
        return held
    return torch.zeros_like(owner.detach(), dtype=dtype)


def _number(key: str, number: Number, piece: Piece, live: Live, same_class: bool) -> Any:
    """A counter as the live optimizer keeps it: torch in a tensor, DeepSpeed in a plain number."""
    value, dtype = number
    optimizer = live.found.optimizer
    inner = optimizer.inner if isinstance(optimizer, Segmented) else optimizer
    if live.routed is not None:
        inner = live.routed.parts[piece.group[OPTIMIZER]]
    is_torch = type(inner).__module__.startswith("torch.")
    if not same_class:
        dtype = "float32" if is_torch else None
        value = value if dtype else int(value)
    elif dtype is None and is_torch and key == "step":
        # torch's own optimizers step with nothing but a tensor, whatever an index says.
        dtype = "float32"
    if dtype is None:
        return value
    # capturable and fused steps read the counter on the device; the others on the host.
    on_device = piece.group.get("capturable") or piece.group.get("fused")
    device = piece.owner.device if on_device else "cpu"
    return torch.tensor(value, dtype=dtype_named("dtype", dtype), device=device)


def _by_owner(pieces: Iterable[Piece]) -> list[list[Piece]]:
    groups: dict[int, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(id(piece.owner), []).append(piece)
    return list(groups.values())
