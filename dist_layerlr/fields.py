"""Settings: a config field is declared once, as a dataclass field with its check and its meaning.

``setting`` declares, ``read`` checks what a user gave, ``settings`` lists what there is (for the
tables in docs/). A check takes (field path, raw value) and returns the parsed value, or raises a
ConfigError that says what is allowed::

    @dataclass(frozen=True, kw_only=True)
    class Options:
        steps: int = setting(integer(1), doc="Optimizer steps.")

    Options(**read("train", {"steps": 10}, Options))
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dist_layerlr.errors import ConfigError

T = TypeVar("T")
_SETTING = "setting"
"""Key of a dataclass field's metadata."""


@dataclass(frozen=True, slots=True)
class Check(Generic[T]):
    """Parses one value, and knows in words what it allows."""

    parse: Callable[[str, object], T]
    words: str | Callable[[], str]
    """A function where the allowed words may grow by registration."""
    schema: Callable[[], Mapping[str, Any]] = dict
    """The same as JSON Schema, as far as it can say it."""

    @property
    def allowed(self) -> str:
        """What the check allows, as error messages say it."""
        return self.words if isinstance(self.words, str) else self.words()

    def __call__(self, path: str, value: object) -> T:
        """Parse a value.

        Raises:
            ConfigError: names the path, the value and what is allowed.
        """
        return self.parse(path, value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a config field is."""

    key: str
    """Its name in JSON."""
    name: str
    """Its name in the dataclass."""
    check: Check[Any]
    doc: str
    unit: str = ""
    default: str = ""
    """As a reader of the docs sees it; empty: the field is required."""

    @property
    def required(self) -> bool:
        """Whether a user must give it."""
        return not self.default


def setting(
    check: Check[Any],
    *,
    doc: str,
    default: Any = dataclasses.MISSING,
    factory: Any = dataclasses.MISSING,
    unit: str = "",
    shown: str = "",
    key: str = "",
) -> Any:
    """Declare a dataclass field that a config may set.

    Args:
        check: parses and checks its value.
        doc: one or two sentences; they stand in the docs' table.
        default: value when the config does not give it.
        factory: makes the default, where it is mutable.
        unit: of the value.
        shown: the default in words, where the value does not say it (None: "the optimizer's").
        key: its name in JSON, where that is no name for an attribute (``type``).
    """
    what = {"check": check, "doc": doc, "unit": unit, "shown": shown, "key": key}
    # One call for all three kinds: dataclasses takes MISSING for "not given".
    return dataclasses.field(default=default, default_factory=factory, metadata={_SETTING: what})


def settings(*classes: type) -> dict[str, Setting]:
    """The settings of dataclasses by JSON key, in order; other fields are left out."""
    found: dict[str, Setting] = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            what = field.metadata.get(_SETTING)
            if what is None:
                continue
            key = what["key"] or field.name
            found[key] = Setting(
                key=key,
                name=field.name,
                check=what["check"],
                doc=what["doc"],
                unit=what["unit"],
                default=what["shown"] or _shown(field),
            )
    return found


def read(path: str, given: Mapping[str, Any], *classes: type) -> dict[str, Any]:
    """Check the fields that a user gave; returns {attribute name: parsed value} of those alone.

    Raises:
        ConfigError: an unknown field (names the nearest) or a bad value.
    """
    known = settings(*classes)
    known_keys(path, given, known)
    return {known[key].name: known[key].check(f"{path}.{key}", given[key]) for key in given}


def check_all(instance: Any) -> None:
    """Check every setting of a dataclass instance that was made by hand.

    Raises:
        ConfigError: a bad value.
    """
    for found in settings(type(instance)).values():
        found.check(found.name, getattr(instance, found.name))


def _shown(field: dataclasses.Field[Any]) -> str:
    """The default as JSON has it."""
    value = field.default
    if value is dataclasses.MISSING:
        return ""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# Checks


def number(low: float, high: float = math.inf, *, open_low: bool = False) -> Check[float]:
    """A finite number in [low, high], or (low, high]."""
    left = "(" if open_low else "["
    above = ">" if open_low else ">="
    allowed = f"a finite number {above} {low:g}"
    if high < math.inf:
        allowed = f"a number in {left}{low:g}, {high:g}]"

    def parse(path: str, value: object) -> float:
        # bool is an int to Python, but `true` is no learning rate.
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise invalid(path, value, allowed)
        try:
            parsed = float(value)
        except OverflowError:
            parsed = math.inf
        if not math.isfinite(parsed) or not low <= parsed <= high or (open_low and parsed == low):
            raise invalid(path, parsed, allowed)
        return parsed

    schema: dict[str, Any] = {"type": "number"}
    schema["exclusiveMinimum" if open_low else "minimum"] = low
    if high < math.inf:
        schema["maximum"] = high
    return Check(parse, allowed, lambda: schema)


def integer(low: int) -> Check[int]:
    """An integer >= low."""
    allowed = f"an integer >= {low}"

    def parse(path: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise invalid(path, value, allowed)
        return value

    return Check(parse, allowed, lambda: {"type": "integer", "minimum": low})


def numbers(*, at_least: int) -> Check[tuple[float, ...]]:
    """A list of numbers in [0, 1]."""
    allowed = f"a list of {at_least} or more numbers in [0, 1]"
    return _sequence(number(0.0, 1.0), allowed, at_least, tuple)


def integers(*, at_least: int) -> Check[list[int]]:
    """A list of integers >= 0."""
    return _sequence(integer(0), f"a list of {at_least} or more integers >= 0", at_least, list)


def one_of(choices: Callable[[], tuple[str, ...]]) -> Check[str]:
    """One of a set of words, which may grow by registration."""

    def words() -> str:
        return "one of " + ", ".join(choices())

    def parse(path: str, value: object) -> str:
        if not isinstance(value, str) or value not in choices():
            raise invalid(path, value, words(), suggestion(str(value), choices()))
        return value

    return Check(parse, words, lambda: {"enum": list(choices())})


def words(choices: tuple[str, ...]) -> Check[tuple[str, ...]]:
    """A list of words of a fixed set."""
    allowed = "a list of words among " + ", ".join(choices)
    return _sequence(one_of(lambda: choices), allowed, 0, tuple)


def either(word: str | None, check: Check[T]) -> Check[T | str | None]:
    """One special value, else whatever ``check`` allows."""

    def parse(path: str, value: object) -> T | str | None:
        # Only a string may equal the word: tensors and arrays answer == with something else.
        if value is word or (isinstance(value, str) and value == word):
            return word
        return check(path, value)

    special = "null" if word is None else word
    return Check(
        parse,
        lambda: f"{special}, or {check.allowed}",
        lambda: {"anyOf": [{"const": word}, check.schema()]},
    )


def mapping_of(inner: Check[T]) -> Check[dict[str, T]]:
    """A JSON object whose values all pass ``inner``."""

    def parse(path: str, value: object) -> dict[str, T]:
        return {key: inner(f"{path}.{key}", item) for key, item in mapping(path, value).items()}

    return Check(
        parse,
        lambda: f"a JSON object of values, each {inner.allowed}",
        lambda: {"type": "object", "additionalProperties": inner.schema()},
    )


def list_of(*classes: type) -> Check[tuple[dict[str, Any], ...]]:
    """A list of JSON objects with the settings of dataclasses; required ones must be there."""

    def item(path: str, value: object) -> dict[str, Any]:
        given = mapping(path, value)
        for key, found in settings(*classes).items():
            if found.required and key not in given:
                raise ConfigError(f"Invalid {path}={value!r}: {key!r} is missing.")
        return read(path, given, *classes)

    allowed = "a list of JSON objects"
    one = Check(item, "a JSON object", lambda: object_schema(*classes))
    return _sequence(one, allowed, 0, tuple)


def _sequence(
    inner: Check[Any], allowed: str, at_least: int, build: Callable[[list[Any]], Any]
) -> Check[Any]:
    def parse(path: str, value: object) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) < at_least:
            raise invalid(path, value, allowed)
        return build([inner(f"{path}[{i}]", item) for i, item in enumerate(value)])

    def schema() -> Mapping[str, Any]:
        found: dict[str, Any] = {"type": "array", "items": inner.schema()}
        return {**found, "minItems": at_least} if at_least else found

    return Check(parse, allowed, schema)


def _boolean(path: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise invalid(path, value, "true or false")
    return value


def _text(path: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(path, value, "a non-empty string")
    return value


def _mapping(path: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid(path, value, "a JSON object")
    return value


boolean = Check(_boolean, "true or false", lambda: {"type": "boolean"})
"""True or false, not 0, 1 or a string."""
text = Check(_text, "a non-empty string", lambda: {"type": "string", "minLength": 1})
"""A non-empty string."""
mapping = Check(_mapping, "a JSON object", lambda: {"type": "object"})
"""A JSON object."""
strings: Check[tuple[str, ...]] = _sequence(text, "a list of strings", 0, tuple)
"""A list of non-empty strings."""


def object_schema(*classes: type) -> dict[str, Any]:
    """JSON Schema of an object with the settings of dataclasses, and no other key."""
    properties: dict[str, Any] = {}
    for key, found in settings(*classes).items():
        doc = f"{found.doc} Unit: {found.unit}." if found.unit else found.doc
        default = f" Default: {found.default}." if found.default else ""
        properties[key] = {**found.check.schema(), "description": f"{doc}{default}"}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    required = [key for key, found in settings(*classes).items() if found.required]
    return {**schema, "required": required} if required else schema


# Keys and wording


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
        # 0.8 takes `per_layer_lrs` for a misspelling, and leaves a trainer's `train_steps` alone.
        close = difflib.get_close_matches(str(key), wanted, n=1, cutoff=0.8)
        if close and key not in wanted and close[0] not in given:
            raise ConfigError(f"Unknown key {key!r} in {path}. Did you mean {close[0]!r}?")


def suggestion(word: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'x'?``, or nothing when no word is near."""
    # 0.6 is difflib's own: here the word is wrong already, and a far guess costs nothing.
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def invalid(path: str, value: object, allowed: str, hint: str = "") -> ConfigError:
    """The one wording of a bad value."""
    return ConfigError(f"Invalid {path}={value!r}: must be {allowed}.{hint}")
