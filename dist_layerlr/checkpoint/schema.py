"""Checks of what a checkpoint's JSON files say, before anything is done with it. Pure.

The files are input like any other: a person may have edited them, and their checksums with them.
Every field passes one of these checks, or one of ``dist_layerlr.fields``, before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import CheckpointError, ConfigError

Parser = Callable[[str, object], Any]
"""(place in the file, value as read) -> value to use; raises ConfigError. A ``Check`` is one."""

_MAX = 2**63
"""Above every size and offset that a file system or torch takes."""


def damaged(path: Path, reason: str) -> CheckpointError:
    """The one wording of a broken file."""
    return CheckpointError(
        f"Checkpoint file {str(path)!r} is damaged or incomplete: {reason.rstrip('.')}. "
        "Restore it, or resume from another checkpoint."
    )


@contextmanager
def checked(path: Path) -> Iterator[None]:
    """Say of which file a field is that does not pass its check.

    Raises:
        CheckpointError: in place of the check's ConfigError.
    """
    try:
        yield
    except ConfigError as error:
        raise damaged(path, str(error)) from None


def record(where: str, value: object, checks: Mapping[str, Parser]) -> dict[str, Any]:
    """A JSON object with exactly these fields, each checked.

    Args:
        where: the object's place in the file, for the error.
        value: as parsed.
        checks: {field: its check}.

    Raises:
        ConfigError: no object, or a field that is missing, unknown or wrong.
    """
    given = fields.mapping(where, value)
    for key in checks:
        if key not in given:
            raise ConfigError(f"Invalid {where}: {key!r} is missing")
    fields.known_keys(where, given, checks)
    return {key: checks[key](f"{where}.{key}", item) for key, item in given.items()}


def each(parser: Parser) -> Parser:
    """A JSON object whose values all pass a parser."""

    def parse(where: str, value: object) -> dict[str, Any]:
        return {k: parser(f"{where}.{k}", v) for k, v in fields.mapping(where, value).items()}

    return parse


def count(where: str, value: object) -> int:
    """A number of elements or bytes, or an offset."""
    if not is_count(value):
        raise fields.invalid(where, value, "an integer from 0 to 2**63 - 1")
    return value  # type: ignore[return-value]


def checksum(where: str, value: object) -> int:
    """A CRC-32."""
    if not is_checksum(value):
        raise fields.invalid(where, value, "an integer from 0 to 2**32 - 1")
    return value  # type: ignore[return-value]


def finite(where: str, value: object) -> float:
    """A number that is neither NaN nor infinite. An integer stays one, of any sign."""
    # The size comes first: isfinite cannot convert an integer of a thousand digits.
    if not isinstance(value, (int, float)) or abs(value) >= _MAX or not math.isfinite(value):
        raise fields.invalid(where, value, "a finite number")
    return value


def is_count(value: object) -> bool:
    """Whether ``count`` takes a value."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX


def is_checksum(value: object) -> bool:
    """Whether ``checksum`` takes a value."""
    return is_count(value) and value < 2**32  # type: ignore[operator]
