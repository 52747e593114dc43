"""User-written name rules: a glob over dotted segments, or ``re:`` and a regular expression."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError

Matcher = Callable[[str], bool]


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> Matcher:
    """Turn a rule into a predicate on canonical names.

    A glob matches a name or any whole-segment prefix of it: ``blocks.0`` matches
    ``blocks.0.attn.to_q.weight`` and not ``blocks.01``. Inside a segment ``*``, ``?`` and ``[...]``
    are the shell's; a segment that is only ``*`` (or ``**``) stands for one or more segments
    (``**``: none too), so ``*.bias`` finds every bias. ``re:`` searches anywhere.

    Raises:
        ConfigError: the pattern does not compile.
    """
    is_regex = pattern.startswith("re:")
    try:
        return _searcher(re.compile(pattern[3:] if is_regex else _glob_to_regex(pattern)))
    except re.error as error:
        kind = "regular expression" if is_regex else "glob"
        raise ConfigError(f"Invalid match={pattern!r}: not a {kind} ({error}).") from None


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like ``wanted``, best first, for error messages."""
    return difflib.get_close_matches(wanted, list(names), n=count, cutoff=0.4)


def _searcher(compiled: re.Pattern[str]) -> Matcher:
    def matches(name: str) -> bool:
        return compiled.search(name) is not None

    return matches


def _glob_to_regex(pattern: str) -> str:
    out = "^"
    segments = re.split(
        r"\.(?![^\[\]]*\])", pattern
    )  # a dot inside [...] is a character of the class
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            out += ".*" if last else r"(?:[^.]+\.)*"
        elif segment == "*":
            out += ".+" if last else r"(?:[^.]+\.)+"
        else:
            out += _segment_to_regex(segment) + ("" if last else r"\.")
    return out + r"(?:\.|$)" if segments[-1] not in ("*", "**") else out + "$"


def _segment_to_regex(segment: str) -> str:
    parts = re.split(r"(\*|\?|\[[^\]]+\])", segment)
    translated = {"*": "[^.]*", "?": "[^.]"}
    return "".join(
        translated.get(part)
        or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part))
        for part in parts
    )


def _parse_pattern(path: str, value: object) -> str:
    pattern = fields.text(path, value)
    try:
        compile_pattern(pattern)
    except ConfigError as error:
        raise ConfigError(f"Invalid {path}: {error}") from None
    return pattern


PATTERN = fields.Check(_parse_pattern, "a name pattern, section 5", fields.text.schema)
"""A field of a config that is one."""
