"""The model families that can be trained: one file each, one line here."""

from __future__ import annotations

from dist_layerlr import fields
from launch.trainer.families.base import Family
from launch.trainer.families.wan import Wan

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
    hint = fields.suggestion(model_type, FAMILIES) or " Plans of other models: `dist-layerlr plan`."
    raise fields.invalid(
        "model_type", model_type, f"one of {', '.join(sorted(FAMILIES))} to be trained here", hint
    )
