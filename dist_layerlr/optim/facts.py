"""What decides how an optimizer behaves: its class and settings, without what its steps change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from dist_layerlr.optim.groups import INITIAL_LR, LR, NAME, WEIGHT_DECAY
from dist_layerlr.optim.scratch import RATES
from dist_layerlr.optim.segmented import MakeOptimizer
from dist_layerlr.sharders.base import ParamGroup

_KINDS = 4
"""Groups with settings of their own (betas ...) that are tried; more are not looked at."""
_COUNTERS: dict[type, set[str]] = {}
"""{class: what its own steps change, as trials have shown}: no settings, so a live optimizer that
has been stepped is the one that was tried."""


def note_counters(optimizer: Any, changed: Iterable[str]) -> None:
    """Remember which facts of a class the steps of a trial have changed: they are no settings."""
    _COUNTERS.setdefault(type(optimizer), set()).update(changed)


def _settings(group: ParamGroup) -> dict[str, Any]:
    """What a group says besides its tensors and what the plan gives it."""
    given = ("params", LR, INITIAL_LR, NAME, "param_names")
    return {key: value for key, value in group.items() if key not in given}


def different(groups: Iterable[ParamGroup]) -> list[ParamGroup]:
    """One group for each setting; weight decay apart, which the plan gives, it is mostly one."""
    found: dict[str, ParamGroup] = {}
    for group in groups:
        settings = _settings(group)
        settings.pop(WEIGHT_DECAY, None)
        found.setdefault(repr(settings), group)
    return list(found.values())[:_KINDS]


def lasting(optimizer: Any) -> tuple[tuple[str, Any], ...]:
    """Class and settings, without what steps change."""
    counters = _COUNTERS.get(type(optimizer), set())
    return tuple(fact for fact in sorted(facts_of(optimizer).items()) if fact[0] not in counters)


def facts_of(optimizer: Any) -> dict[str, Any]:
    """Class, settings and counters by name, those of optimizers inside it included."""
    facts: dict[str, Any] = {"class": type(optimizer)}
    facts["defaults"] = repr(getattr(optimizer, "defaults", None))
    for name, value in vars(optimizer).items():
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_"):
            facts[f"self.{name}"] = value
        elif isinstance(value, Optimizer) and value is not optimizer:
            facts |= {f"{name}/{inner}": fact for inner, fact in facts_of(value).items()}
    for number, group in enumerate(different(optimizer.param_groups)):
        for key, value in _settings(group).items():
            # For each kind of group; what counts in one of them counts in all.
            facts[f"group.{key}"] = (*facts.get(f"group.{key}", ()), number, repr(value))
    return facts


def rebuild(optimizer: Any) -> MakeOptimizer:
    """Build an optimizer of the same class and settings by its constructor."""

    def make(groups: list[ParamGroup]) -> Optimizer:
        defaults = dict(optimizer.defaults)
        live: list[ParamGroup] = different(optimizer.param_groups) or [{}]
        # Counters that an optimizer keeps in its groups are no settings: a new one starts at 0.
        settings = {key: live[0][key] for key in defaults if key in live[0]}
        told = [{**settings, **group} for group in groups]
        kind: Any = type(optimizer)
        with contextlib.suppress(TypeError):
            return kind(told, **defaults)  # type: ignore[no-any-return]
        with contextlib.suppress(TypeError):
            return kind(told, lr=RATES[0])  # type: ignore[no-any-return]
        return kind(told)  # type: ignore[no-any-return]

    return make
