"""Changes of a plan while it trains: parts of the model at multiples of their rates, or held still.

Pure: a plan in, a plan out. What comes out is a plan like any other: its digest, its ``plan.json``
and the proof of the live optimizer are those of the rates that train.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting
from dist_layerlr.plan.entries import Plan, PlanEntry
from dist_layerlr.plan.names import base_name
from dist_layerlr.plan.patterns import compile_pattern, nearest

STEER = "steer"
"""How errors call a set of changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the model: a component, what a pattern matches, or where both hold."""

    component: str | None = setting(
        fields.text, default=None, doc="A component of the plan, as its grid names it."
    )
    match: str | None = setting(
        fields.text, default=None, doc="A pattern of parameter names, as a region has it."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled(Part):
    """A part, and what its rates are multiplied by."""

    by: float = setting(
        fields.number(0.0, open_low=True),
        doc="Multiplies the rates of the part, on top of what multiplied them before.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is to change, in this order: ``reset``, ``thaw``, ``freeze``, ``scale``."""

    reset: bool = setting(
        fields.boolean, default=False, doc="Forget every change so far: the config's rates apply."
    )
    thaw: tuple[Part, ...] = setting(
        fields.list_of(Part), default=(), doc="Parts that `freeze` has stopped train on."
    )
    freeze: tuple[Part, ...] = setting(
        fields.list_of(Part), default=(), doc="Parts that are held still, at a rate of 0."
    )
    scale: tuple[Scaled, ...] = setting(
        fields.list_of(Scaled), default=(), doc="Parts whose rates are multiplied."
    )

    @property
    def empty(self) -> bool:
        """Whether no rate is asked to change."""
        return not (self.reset or self.thaw or self.freeze or self.scale)

    def to_dict(self) -> dict[str, Any]:
        """As ``read_changes`` takes it."""
        found: dict[str, Any] = {"reset": True} if self.reset else {}
        for key in ("thaw", "freeze", "scale"):
            parts = [_given(part) for part in getattr(self, key)]
            found |= {key: parts} if parts else {}
        return found


def read_changes(raw: Mapping[str, Any] | Changes) -> Changes:
    """Check what a user gave: ``{"scale": [{"component": "ffn", "by": 0.5}], "freeze": [...]}``.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """
    if isinstance(raw, Changes):
        return raw
    return made(fields.read(STEER, fields.mapping(STEER, raw), Changes))


def made(values: dict[str, Any]) -> Changes:
    """The changes of values that are checked field by field already.

    Raises:
        ConfigError: a part that names nothing.
    """
    parts: dict[str, Any] = {}
    for key, kind in (("thaw", Part), ("freeze", Part), ("scale", Scaled)):
        listed = [kind(**given) for given in values.pop(key, ())]
        for number, part in enumerate(listed):
            if part.component is None and part.match is None:
                raise ConfigError(
                    f"Invalid {STEER}.{key}[{number}]: it names no part of the model. Give"
                    " 'component', 'match', or both."
                )
        parts[key] = tuple(listed)
    return Changes(**values, **parts)


def steered(plan: Plan, *changes: Mapping[str, Any] | Changes) -> Plan:
    """The plan after changes, one after the other.

    Multiples multiply: twice 0.5 is 0.25 of the plan's own rate. What is frozen stays at 0 until it
    is thawed, and then has the rate that all multiples give it.

    Raises:
        ConfigError: a bad field, or a part that holds nothing that trains.
    """
    origin = plan.origin or plan
    steps = list(plan.changes)
    for change in map(read_changes, changes):
        _check_parts(origin, change)
        # What was reset need not be kept: a plan that is reset is the one it was.
        steps = [] if change.reset else steps
        if not replace(change, reset=False).empty:
            steps.append(replace(change, reset=False))
    if not steps:
        return origin
    # From the origin each time, so that the rates do not depend on how many plans led to them.
    factors = dict.fromkeys(origin.entries, 1.0)
    held: set[str] = set()
    for change in steps:
        held -= _names(origin, change.thaw)
        held |= _names(origin, change.freeze)
        for part in change.scale:
            for name in _names(origin, [part]):
                factors[name] *= part.by
    entries = dict(origin.entries)
    for name, entry in origin.entries.items():
        factor = 0.0 if name in held else factors[name]
        if factor != 1.0:
            entries[name] = replace(entry, lr=entry.lr * factor)
    return replace(origin, entries=entries, origin=origin, changes=tuple(steps))


def _given(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ("component", "match", "by"):
        value = getattr(part, key, None)
        if value is not None:
            found[key] = value
    return found


def _names(plan: Plan, parts: Sequence[Part]) -> set[str]:
    found: set[str] = set()
    for part in parts:
        matches = compile_pattern(part.match) if part.match is not None else None
        for name, entry in plan.entries.items():
            if part.component not in (None, entry.component):
                continue
            if matches is None or matches(name) or matches(base_name(name)):
                found.add(name)
    return found


def _check_parts(plan: Plan, changes: Changes) -> None:
    """Refuse a part that holds nothing: a misspelt change would be lost without a word."""
    components = sorted(set(map(_component, plan.entries.values())))
    for key in ("thaw", "freeze", "scale"):
        for number, part in enumerate(getattr(changes, key)):
            _check_part(plan, part, f"{STEER}.{key}[{number}]", components)


def _component(entry: PlanEntry) -> str:
    return entry.component


def _check_part(plan: Plan, part: Part, path: str, components: Collection[str]) -> None:
    if part.component is not None:
        fields.one_of(lambda: tuple(components))(f"{path}.component", part.component)
    if part.match is None:
        return
    try:
        found = _names(plan, [part])
    except ConfigError as error:
        raise ConfigError(f"Invalid {path}: {error}") from None
    if not found:
        where = f" of component {part.component!r}" if part.component is not None else ""
        near = nearest(part.match, plan.entries) or list(plan.entries)[:1]
        raise ConfigError(
            f"Invalid {path}.match={part.match!r}: it matches no parameter{where} that trains."
            f" Nearest names: {', '.join(near)}. A glob starts at the first segment; '*.' in front"
            " matches at any depth."
        )
