"""When a name trains: a window of optimizer steps, a ramp into it, a schedule of its own. Pure.

Everything is a function of the step alone, so that neither a resume nor a world size changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting
from dist_layerlr.plan.patterns import PATTERN

KINDS = ("constant", "linear", "cosine")
LAST, FIRST = "last", "first"
Row = tuple[int, int | None, int, str | None, float, int]
"""A ``Timing`` as plain values: groups of an optimizer are saved, and loaded without pickles."""


def curve(kind: str, step: int, warmup: int, total: int, min_ratio: float) -> float:
    """Linear warmup, then constant, linear or cosine decay to ``min_ratio`` at ``total - 1``."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    span = max(1, total - 1 - warmup)
    x = min(1.0, (step - warmup) / span)
    shape = 1.0 - x if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * x))
    return min_ratio + (1.0 - min_ratio) * shape


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSchedule:
    """A schedule of some names, in place of the run's."""

    kind: str = setting(
        fields.one_of(lambda: KINDS), default="constant", key="type", doc="Shape after the ramp."
    )
    min_ratio: float = setting(
        fields.number(0.0, 1.0), default=0.0, doc="Multiplier of the rates at its last step."
    )
    steps: int | None = setting(
        fields.integer(1),
        default=None,
        unit="optimizer steps",
        shown="`until` - `from`",
        doc="Its length, counted from `from`.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfreeze:
    """Gradual unfreezing: one block after the other."""

    by: str = setting(
        fields.one_of(lambda: ("depth",)), default="depth", doc="Blocks follow in order of depth."
    )
    every: int = setting(
        fields.integer(1), default=1, unit="optimizer steps", doc="From one block to the next."
    )
    start: str = setting(
        fields.one_of(lambda: (LAST, FIRST)), default=LAST, doc="The block that trains first."
    )


def _nested(cls: type, words: str) -> fields.Check[Any]:
    def parse(path: str, value: object) -> Any:
        return cls(**fields.read(path, fields.mapping(path, value), cls))

    return fields.Check(parse, words, lambda: fields.object_schema(cls))


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingSettings:
    """When the parameters of a rule or a region train."""

    start: int = setting(
        fields.integer(0),
        default=0,
        key="from",
        unit="optimizer steps",
        doc="First step that trains them; before it they are held.",
    )
    until: int | None = setting(
        fields.integer(1),
        default=None,
        shown="the end",
        unit="optimizer steps",
        doc="First step that trains them no more.",
    )
    ramp: int = setting(
        fields.integer(0),
        default=0,
        unit="optimizer steps",
        doc="From 0 to their rates, linearly; the first step trains at 1/ramp.",
    )
    schedule: OwnSchedule | None = setting(
        _nested(OwnSchedule, '`{"type", "min_ratio", "steps"}`'),
        default=None,
        shown="the run's",
        doc="Of their own, in place of the run's: `type`, `min_ratio` and `steps`.",
    )
    unfreeze: Unfreeze | None = setting(
        _nested(Unfreeze, '`{"by": "depth", "every": N, "start": "last"}`'),
        default=None,
        shown="all at `from`",
        doc="One block after the other, from `from` on: `by`, `every` and `start`"
        " (`last` or `first`).",
    )


def _parse_depth(path: str, value: object) -> tuple[float, float]:
    found = fields.numbers(at_least=2)(path, value)
    if len(found) != 2 or found[0] > found[1]:
        raise fields.invalid(path, value, "two numbers in [0, 1], the smaller first")
    return found[0], found[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingRule:
    """Which parameters a timing is for; all that is given must hold."""

    match: str = setting(
        PATTERN,
        default="**",
        doc="A name pattern.",
    )
    components: tuple[str, ...] = setting(
        fields.strings, default=(), shown="all", doc="Their components."
    )
    depth: tuple[float, float] | None = setting(
        fields.Check(_parse_depth, "two numbers in [0, 1], the smaller first"),
        default=None,
        shown="all, and what lies outside blocks",
        doc="Blocks by relative depth, both ends included; 0 is the first block, 1 the last.",
    )
    settings: TimingSettings = TimingSettings()
    """Its fields stand in the rule itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When one name trains, resolved."""

    start: int = 0
    until: int | None = None
    ramp: int = 0
    kind: str | None = None
    """Shape of a schedule of its own; None: the run's."""
    min_ratio: float = 0.0
    steps: int = 0
    """Length of its own schedule."""

    def held(self, step: int) -> bool:
        """Whether the name must not move at a step, nor its moments."""
        return step < self.start or (self.until is not None and step >= self.until)

    def factor(self, step: int, run: float = 1.0) -> float:
        """Multiplier of the planned rate at a step.

        Args:
            step: of the optimizer, counted from 0.
            run: what the run's schedule multiplies all rates by.
        """
        if self.held(step):
            return 0.0
        since = step - self.start
        if self.kind is not None:
            return curve(self.kind, since, self.ramp, self.steps, self.min_ratio)
        return run * curve("constant", since, self.ramp, 1, 0.0)

    @property
    def row(self) -> Row:
        """As plain values."""
        return (self.start, self.until, self.ramp, self.kind, self.min_ratio, self.steps)

    @classmethod
    def of(cls, row: Any) -> Timing:
        """From plain values."""
        start, until, ramp, kind, min_ratio, steps = row
        return cls(start=start, until=until, ramp=ramp, kind=kind, min_ratio=min_ratio, steps=steps)

    def __str__(self) -> str:
        """In words: `steps 200 to 999, ramp 50`."""
        end = "on" if self.until is None else f"to {self.until - 1}"
        text = f"from step {self.start} {end}" + (f", ramp {self.ramp}" if self.ramp else "")
        if self.kind is None:
            return text
        floor = "" if self.kind == "constant" else f" to {self.min_ratio:g} in {self.steps} steps"
        return f"{text}, own schedule {self.kind}{floor}"


def settle(settings: TimingSettings, place: int, path: str) -> Timing | None:
    """The timing of a name that a rule hits; None: it always trains.

    Args:
        settings: of the rule.
        place: how many blocks are unfrozen before its own.
        path: of the rule in the config.

    Raises:
        ConfigError: a window that never opens, or a schedule without an end.
    """
    start = settings.start
    if settings.unfreeze is not None:
        start += settings.unfreeze.every * place
    until, own = settings.until, settings.schedule
    if until is not None and until <= start:
        raise fields.invalid(
            f"{path}.until",
            until,
            f"above {start}, the first step of block {place} in order"
            if place
            else f"above 'from' ({start})",
        )
    if until is not None and settings.ramp > until - start:
        allowed = f"at most {until - start}, the steps from {start} until {until}"
        raise fields.invalid(f"{path}.ramp", settings.ramp, allowed)
    timing = Timing(start=start, until=until, ramp=settings.ramp)
    if own is not None:
        steps = own.steps or (until - start if until is not None else 0)
        if not steps and own.kind != "constant":
            raise ConfigError(
                f"Invalid {path}.schedule={own.kind!r}: it has no end. Give 'steps' in it, or"
                " 'until' beside it."
            )
        floor = own.min_ratio if own.kind != "constant" else 0.0
        timing = replace(timing, kind=own.kind, min_ratio=floor, steps=steps or 1)
    return None if timing == Timing() else timing


def read_rules(path: str, value: object) -> tuple[TimingRule, ...]:
    """Parse the list of rules."""
    rows = fields.list_of(TimingRule, TimingSettings)(path, value)
    return tuple(_rule(row, f"{path}[{i}]") for i, row in enumerate(rows))


def _rule(row: dict[str, Any], path: str) -> TimingRule:
    settings = pop_settings(row)
    rule = TimingRule(settings=settings, **row)
    # Whatever a model has, this must hold: it is refused before one is read.
    settle(settings, 0, path)
    return rule


def pop_settings(row: dict[str, Any]) -> TimingSettings:
    """Take the settings of a timing out of a parsed row that holds others, too."""
    own: Mapping[str, Any] = {
        found.name: row.pop(found.name)
        for found in fields.settings(TimingSettings).values()
        if found.name in row
    }
    return TimingSettings(**own)


RULES = fields.Check(
    read_rules,
    "a list of JSON objects",
    lambda: fields.list_of(TimingRule, TimingSettings).schema(),
)
