"""The model families that can be trained: one file each, one line here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from dist_layerlr import fields
from launch.trainer.families.base import Family

# Imported only when asked for: each family has its own dependencies.
FAMILIES: dict[str, str] = {
    "wan": "wan:Wan",
}
"""``model_type`` -> module and class."""


def get_family(model_type: str) -> Family:
    """Return the family of a config's ``model_type``.

    Raises:
        ConfigError: no such family; names the allowed ones.
    """
    if model_type in FAMILIES:
        return _made(model_type)
    hint = fields.suggestion(model_type, FAMILIES) or " Plans of other models: `dist-layerlr plan`."
    raise fields.invalid(
        "model_type", model_type, f"one of {', '.join(sorted(FAMILIES))} to be trained here", hint
    )


@cache
def _made(model_type: str) -> Family:
    module, name = FAMILIES[model_type].split(":")
    family: Family = getattr(import_module(f".{module}", __name__), name)()
    return family
