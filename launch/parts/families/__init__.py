"""The model families that can be trained: one file each, one line here."""

from __future__ import annotations

from difflib import get_close_matches

from dist_layerlr.errors import ConfigError

from .base import Family
from .wan import Wan

FAMILIES: dict[str, Family] = {
    "wan": Wan(),
}


def get_family(model_type: str) -> Family:
    """Return the family of a config's ``model_type``.

    Raises:
        ConfigError: no such family; names the allowed ones.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = get_close_matches(str(model_type), FAMILIES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"Invalid model_type={model_type!r}. Must be one of {sorted(FAMILIES)}.{hint}")
