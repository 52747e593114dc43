"""Small validators: (field path, raw value) -> parsed value, or a ConfigError that says what is
allowed.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dist_layerlr.errors import ConfigError

Check = Callable[[str, object], Any]


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    """A finite number in [low, high], or (low, high]."""
    left = "(" if open_low else "["
    above = ">" if open_low else ">="
    allowed = (
        f"a number in {left}{low:g}, {high:g}]"
        if high < math.inf
        else f"a finite number {above} {low:g}"
    )

    def check(path: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise invalid(path, value, allowed)
        try:
            parsed = float(value)
        except OverflowError:
            parsed = math.inf
        if not math.isfinite(parsed) or not low <= parsed <= high or (open_low and parsed == low):
            raise invalid(path, parsed, allowed)
        return float(value)

    return check


def integer(low: int) -> Check:
    """An integer >= low."""

    def check(path: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise invalid(path, value, f"an integer >= {low}")
        return value

    return check


def numbers(*, at_least: int) -> Check:
    """A list of numbers in [0, 1]."""
    return _sequence(
        number(0.0, 1.0), f"a list of {at_least} or more numbers in [0, 1]", at_least, tuple
    )


def integers(*, at_least: int) -> Check:
    """A list of integers >= 0."""
    return _sequence(integer(0), f"a list of {at_least} or more integers >= 0", at_least, list)


def strings(path: str, value: object) -> tuple[str, ...]:
    """A list of non-empty strings."""
    result: tuple[str, ...] = _sequence(text, "a list of strings", 0, tuple)(path, value)
    return result


def boolean(path: str, value: object) -> bool:
    """True or false, not 0, 1 or a string."""
    if not isinstance(value, bool):
        raise invalid(path, value, "true or false")
    return value


def text(path: str, value: object) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise invalid(path, value, "a non-empty string")
    return value


def mapping(path: str, value: object) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, Mapping):
        raise invalid(path, value, "a JSON object")
    return value


def one_of(choices: Callable[[], tuple[str, ...]]) -> Check:
    """One of a set of words, which may grow by registration."""

    def check(path: str, value: object) -> str:
        allowed = choices()
        if not isinstance(value, str) or value not in allowed:
            raise invalid(
                path, value, "one of " + ", ".join(allowed), suggestion(str(value), allowed)
            )
        return value

    return check


def mapping_of(inner: Check) -> Check:
    """A JSON object whose values all pass ``inner``."""

    def check(path: str, value: object) -> dict[str, Any]:
        return {key: inner(f"{path}.{key}", item) for key, item in mapping(path, value).items()}

    return check


def list_of(allowed: Mapping[str, Check], *, required: Sequence[str]) -> Check:
    """A list of JSON objects with known fields."""

    def item(path: str, value: object) -> dict[str, Any]:
        missing = [key for key in required if key not in mapping(path, value)]
        if missing:
            raise ConfigError(f"Invalid {path}={value!r}: {missing[0]!r} is missing.")
        return fields(path, mapping(path, value), allowed)

    return _sequence(item, "a list of JSON objects", 0, tuple)


def fields(path: str, given: Mapping[str, Any], allowed: Mapping[str, Check]) -> dict[str, Any]:
    """Check every field of an object; unknown ones are an error."""
    known_keys(path, given, allowed)
    return {key: allowed[key](f"{path}.{key}", value) for key, value in given.items()}


def known_keys(path: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse keys that are not allowed, naming the nearest."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            hint = suggestion(str(key), allowed)
            raise ConfigError(
                f"Unknown key {key!r} in {path}.{hint} Allowed: {', '.join(sorted(allowed))}."
            )


def near_misses(path: str, given: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuse keys that are almost, but not quite, a wanted one.

    Other keys belong to somebody else.
    """
    wanted = list(wanted)
    for key in given:
        close = difflib.get_close_matches(str(key), wanted, n=1, cutoff=0.8)
        if close and key not in wanted and close[0] not in given:
            raise ConfigError(f"Unknown key {key!r} in {path}. Did you mean {close[0]!r}?")


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing when no word is near."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def invalid(path: str, value: object, allowed: str, hint: str = "") -> ConfigError:
    """The one wording of a bad value."""
    return ConfigError(f"Invalid {path}={value!r}: must be {allowed}.{hint}")


def _sequence(
    inner: Check, allowed: str, at_least: int, build: Callable[[list[Any]], Any]
) -> Check:
    def check(path: str, value: object) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) < at_least:
            raise invalid(path, value, allowed)
        return build([inner(f"{path}[{i}]", item) for i, item in enumerate(value)])

    return check
