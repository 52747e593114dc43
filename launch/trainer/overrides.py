"""``--set KEY.SUBKEY=VALUE``: what of a config a command line overrides."""

from __future__ import annotations

import json
from typing import Any

from dist_layerlr.errors import ConfigError


def apply_override(raw: dict[str, Any], assignment: str) -> None:
    """Apply ``a.b.c=value`` in place.

    Raises:
        ConfigError: no ``=``, or a path through something that is no object.
    """
    path, sign, text = assignment.partition("=")
    if not sign or not path:
        raise ConfigError(
            f"Invalid --set {assignment!r}: expected KEY.SUBKEY=VALUE, such as train.steps=100."
        )
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    target: Any = raw
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(
                f"Invalid --set {assignment!r}: {parent!r} is not an object in the config."
            )
    target[last] = value
