"""The block ``width_scaling`` of a config, and what it makes of a name. Pure.

Apart from ``plan/scaling.py``, which reads the base model: the config is made before any plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting

WIDTH_BLOCK = "width_scaling"
"""Key of the config, beside ``per_layer_lr``."""
MUP, COMPLETEP = "mup", "completep"


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthScales:
    """What a parameter's shape multiplies, beside a base model's."""

    lr: float
    weight_decay: float
    eps: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthScaling:
    """The ``width_scaling`` block."""

    base: str = setting(
        fields.text,
        doc="The model at which the rates were found: a tsv of names and shapes, a safetensors"
        " file or a checkpoint folder, as `dist-layerlr plan` reads one.",
    )
    rule: str = setting(
        fields.one_of(lambda: (MUP, COMPLETEP)),
        default=MUP,
        doc="`mup` knows widths; `completep` depths, too.",
    )
    alpha: float = setting(
        fields.number(0.5, 1.0),
        default=1.0,
        doc="CompleteP: residual branches of the model are multiplied by depth ratio^-alpha.",
    )
    eps: float | None = setting(
        fields.number(0.0, open_low=True),
        default=None,
        shown="the optimizer's own, unscaled",
        doc="Adam's epsilon at the base model, scaled by name.",
    )


def parse_width(path: str, value: object) -> WidthScaling | None:
    """Read the block.

    Raises:
        ConfigError: an unknown key or a bad value.
    """
    if value is None:
        return None
    given = fields.mapping(path, value)
    fields.known_keys(path, given, fields.settings(WidthScaling))
    if "base" not in given:
        raise ConfigError(f"Invalid {path}: 'base', the model that the rates are from, is missing.")
    return WidthScaling(**fields.read(path, given, WidthScaling))


WIDTH: fields.Check[WidthScaling | None] = fields.Check(
    parse_width, "a block of settings, or null", lambda: fields.object_schema(WidthScaling)
)
