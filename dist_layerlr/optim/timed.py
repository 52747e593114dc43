"""Held names: what a plan's timing holds at a step is not stepped, as if it needed no gradient.

Three things would move a held name although its rate is 0: moments and step counters, which the
optimizer updates from its gradient; another name's update, where its gradient counts in the global
norm; weight decay that is not multiplied by the rate. So its gradient goes, in three places.

During backward, a hook on the parameter makes it zero, where parameters are what autograd sees
(plain, DDP, DeepSpeed, which clips inside its own step). Before clipping, ``drop_held`` removes it
(FSDP fills sharded gradients past autograd). Before a step, ordinary groups lose it, and segments
leave their groups out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.groups import STEP, UNKNOWN, is_held
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.timing import Timing
from dist_layerlr.sharders.base import Slice, local, local_gradient
from dist_layerlr.sharders.model import live_parameters, unwrap

_HOLDING: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()
"""{unwrapped model: what removes the gradients of its held names}."""


def step_of(optimizer: Any) -> int | None:
    """The step that a timed plan's groups are at; None: no name has a timing."""
    groups = optimizer.param_groups if optimizer is not None else ()
    return next((group[STEP] for group in groups if STEP in group), None)


def known_step(optimizer: Any) -> int:
    """As ``step_of``, of a timed plan.

    Raises:
        ConfigError: nobody has said it: names that start later would never train.
    """
    step = step_of(optimizer)
    if step is None or step == UNKNOWN:
        raise ConfigError(
            "The plan has timings, and nobody has told the optimizer which step it is at. Drive it"
            " with PlanSchedule(optimizer, Schedule()) or follow(optimizer, ...), and step that"
            " after each optimizer step; or call scale_lrs(optimizer, factor, step)."
        )
    return step


@contextmanager
def without_held(optimizer: Any) -> Iterator[bool]:
    """Leave held groups out of an optimizer for one step; yields whether any group is left."""
    groups = optimizer.param_groups
    # Without its gradients a group would still count steps, where an optimizer counts by group.
    optimizer.param_groups = [group for group in groups if not is_held(group)]
    try:
        yield bool(optimizer.param_groups)
    finally:
        optimizer.param_groups = groups


def drop_held(model: nn.Module) -> None:
    """Remove the gradients of held names, so that no global norm has them.

    ``clip_grad_norm`` and every step of an optimizer that ``attach`` built call it; call it before
    a clipping of your own under FSDP.
    """
    drop = _HOLDING.get(unwrap(model))
    if drop is not None:
        drop()


def hold(plan: Plan, model: nn.Module, optimizer: Optimizer, slices: Iterable[Slice]) -> None:
    """Keep held names of a timed plan still, in an optimizer on ``slices`` of a model."""
    if not plan.timed:
        return
    _refuse_dampening(optimizer)
    of_owner: dict[int, list[Slice]] = {}
    for piece in slices:
        of_owner.setdefault(id(piece.owner), []).append(piece)
    known = weakref.ref(optimizer)
    # Weak: the optimizer holds the parameters, and these would hold it.
    for name, param in live_parameters(model).items():
        entry = plan.entries.get(name)
        if entry is not None and entry.timing is not None and param.requires_grad:
            param.register_hook(_Muted(known, entry.timing))  # type: ignore[no-untyped-call]

    def drop() -> None:
        live = known()
        if live is not None:
            _drop(plan, step_of(live), of_owner.values())

    _HOLDING[unwrap(model)] = drop
    if not hasattr(optimizer, "inner"):
        optimizer.register_step_pre_hook(_before_step)


class _Muted:
    """The hook on a parameter; no closure, so that it keeps no model alive."""

    def __init__(self, optimizer: weakref.ref[Optimizer], timing: Timing):
        self._optimizer, self._timing = optimizer, timing

    def __call__(self, gradient: Tensor) -> Tensor | None:
        step = step_of(self._optimizer())
        if step is None or step == UNKNOWN or not self._timing.held(step):
            return None
        # Not a product with 0: a held name's infinite gradient must not stop the others.
        return torch.zeros_like(gradient)


def _before_step(optimizer: Any, *_: Any) -> None:
    """Ordinary groups: what has no gradient is left out by every optimizer."""
    step = step_of(optimizer)
    if step is None:
        return
    given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if step == UNKNOWN:
        # DeepSpeed steps on zero gradients before training, to make room for state.
        if any(bool(local(p.grad).any()) for p in given):
            known_step(optimizer)
        for param in given:
            param.grad = None
        return
    for group in optimizer.param_groups:
        if is_held(group):
            for param in group["params"]:
                param.grad = None


@torch.no_grad()
def _drop(plan: Plan, step: int | None, owners: Iterable[list[Slice]]) -> None:
    if step is None or step == UNKNOWN:
        return
    for pieces in owners:
        owner = pieces[0].owner
        if owner.grad is None:
            continue
        held = [piece for piece in pieces if _holds(plan, piece.name, step)]
        if len(held) == len(pieces):
            owner.grad = None
        elif held:
            flat = local_gradient(owner).view(-1)
            for piece in held:
                flat[piece.offset : piece.offset + piece.numel].zero_()


def _holds(plan: Plan, name: str, step: int) -> bool:
    entry = plan.entries.get(name)
    return entry is not None and entry.timing is not None and entry.timing.held(step)


def _refuse_dampening(optimizer: Any) -> None:
    """SGD's first step takes a gradient undamped; after a load nobody tells which one is first."""
    inner = getattr(optimizer, "inner", None) or optimizer
    for group in inner.param_groups:
        if group.get("dampening"):
            raise ConfigError(
                f"Invalid dampening={group['dampening']} with a plan that has timings: a name that"
                " starts late has no momentum yet, which a saved one of zero does not tell. Use 0."
            )
