"""The ``per_layer_lr`` block: frozen dataclasses, and a reader that rejects what it does not know.

Every error names the field, the value, what is allowed, and the nearest key when one was misspelt.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json
from dist_layerlr.plan.components import known_components
from dist_layerlr.plan.depth import DEPTH_FUNCTIONS, LAYER_DECAY, DepthSettings
from dist_layerlr.plan.layer_decay import CONVENTIONS
from dist_layerlr.plan.patterns import compile_pattern
from dist_layerlr.plan.presets import PRESET_FUNCTIONS, PRESETS

SEED_COMPONENT_LR: Mapping[str, float] = MappingProxyType(
    {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5}
)
"""component_lr when the key is absent. A key that is present means exactly what it lists."""
FALLBACK_LR = 3e-4
"""default_lr when neither it nor learning_rate is given."""
BLOCK = "per_layer_lr"


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternRule:
    """A user rule that names the component of the parameters it matches."""

    match: str
    component: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of the model with rules of its own.

    What it does not give, it takes from the block around it.
    """

    match: str
    lr: float | None = None
    """Absolute LR before depth; replaces component_lr and default_lr inside the region."""
    lr_multiplier: float = 1.0
    component_lr: Mapping[str, float] | None = None
    depth: DepthSettings | None = None
    """None: the depth of the block around it, numbered with it."""
    weight_decay: float | None = None
    no_decay: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerLR:
    """A validated ``per_layer_lr`` block. LRs are absolute, factors dimensionless."""

    enabled: bool = False
    component_lr: Mapping[str, float] = field(default_factory=lambda: SEED_COMPONENT_LR)
    default_lr: float = FALLBACK_LR
    depth: DepthSettings = field(default_factory=DepthSettings)
    log_grad_norms: bool = False
    patterns: tuple[PatternRule, ...] = ()
    regions: tuple[Region, ...] = ()
    weight_decay: float | None = None
    """None: the optimizer's."""
    no_decay: tuple[str, ...] = ()
    """Name patterns, ``ndim<=1`` (true shape) or ``norm`` (owner is a norm): weight decay 0."""
    lora_plus_ratio: float = 1.0
    unmatched: str = "warn"
    resume_lr: str = "plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a plan is made from: the training config's own fields that matter to learning rates."""

    model_type: str = "model"
    learning_rate: float | None = None
    per_layer_lr: PerLayerLR = field(default_factory=PerLayerLR)

    @property
    def flat_lr(self) -> float:
        """The one LR when per_layer_lr is off."""
        return FALLBACK_LR if self.learning_rate is None else self.learning_rate


_DEPTH_FIELDS: dict[str, fields.Check] = {
    "depth_strategy": fields.one_of(lambda: (*DEPTH_FUNCTIONS, LAYER_DECAY)),
    "depth_scope": fields.one_of(lambda: ("stack", "trunk")),
    "min_depth_factor": fields.number(0.0, 1.0),
    "peak_position": fields.number(0.0, 1.0),
    "layer_decay": fields.number(0.0, 1.0, open_low=True),
    "depth_table": fields.numbers(at_least=2),
    "convention": fields.one_of(lambda: tuple(CONVENTIONS)),
    "num_layers": fields.integer(1),
}
_LR = fields.number(0.0)


def _no_decay(path: str, value: object) -> tuple[str, ...]:
    rules = fields.strings(path, value)
    for rule in rules:
        if rule not in ("ndim<=1", "norm"):
            _pattern(path, rule)
    return rules


def _pattern(path: str, value: object) -> str:
    text = fields.text(path, value)
    try:
        compile_pattern(text)
    except ConfigError as error:
        raise ConfigError(f"Invalid {path}: {error}") from None
    return text


_REGION_FIELDS: dict[str, fields.Check] = {
    "match": _pattern,
    "lr": _LR,
    "lr_multiplier": _LR,
    "component_lr": fields.mapping_of(_LR),
    "weight_decay": _LR,
    "no_decay": _no_decay,
    **_DEPTH_FIELDS,
}
_PATTERN_FIELDS: dict[str, fields.Check] = {"match": _pattern, "component": fields.text}
_BLOCK_FIELDS: dict[str, fields.Check] = {
    "enabled": fields.boolean,
    "component_lr": fields.mapping_of(_LR),
    "default_lr": _LR,
    "log_grad_norms": fields.boolean,
    "patterns": fields.list_of(_PATTERN_FIELDS, required=("match", "component")),
    "regions": fields.list_of(_REGION_FIELDS, required=("match",)),
    "weight_decay": _LR,
    "no_decay": _no_decay,
    "lora_plus_ratio": fields.number(1.0),
    "unmatched": fields.one_of(lambda: ("default", "warn", "error")),
    "resume_lr": fields.one_of(lambda: ("plan", "checkpoint")),
    **_DEPTH_FIELDS,
}


def load_config(source: str | Path | Mapping[str, Any] | Config) -> Config:
    """Read a training config: a JSON file or the mapping it holds.

    Keys of the trainer's own are left alone.

    Raises:
        ConfigError: unreadable file, unknown key or bad value in ``per_layer_lr``, or a misspelt
            top-level key.
    """
    if isinstance(source, Config):
        return source
    raw = source if isinstance(source, Mapping) else read_json(source)
    fields.near_misses("config", raw, (BLOCK, "learning_rate", "model_type"))
    if BLOCK not in raw and raw.keys() & (_BLOCK_FIELDS.keys() | {"preset"}) - {"weight_decay"}:
        found = sorted(raw.keys() & (_BLOCK_FIELDS.keys() | {"preset"}))
        raise ConfigError(
            f"Invalid config: {found} must stand inside a {BLOCK!r} block, beside 'learning_rate'."
        )
    rate = None if raw.get("learning_rate") is None else _LR("learning_rate", raw["learning_rate"])
    model_type = fields.text("model_type", raw.get("model_type", "model"))
    return Config(
        model_type=model_type, learning_rate=rate, per_layer_lr=_read_block(raw.get(BLOCK), rate)
    )


def _read_block(raw: object, learning_rate: float | None) -> PerLayerLR:
    if raw is None:
        return PerLayerLR(default_lr=FALLBACK_LR if learning_rate is None else learning_rate)
    given = _expand_preset(fields.mapping(BLOCK, raw), learning_rate)
    fields.known_keys(BLOCK, given, [*_BLOCK_FIELDS, "preset"])
    values = fields.fields(BLOCK, given, _BLOCK_FIELDS)
    depth = replace(DepthSettings(), **{k: values.pop(k) for k in _DEPTH_FIELDS if k in values})
    _check_depth(BLOCK, depth)
    values.setdefault("default_lr", FALLBACK_LR if learning_rate is None else learning_rate)
    regions = tuple(_region(i, r, depth) for i, r in enumerate(values.pop("regions", ())))
    patterns = tuple(PatternRule(**p) for p in values.pop("patterns", ()))
    block = PerLayerLR(depth=depth, regions=regions, patterns=patterns, **values)
    _check_components(block)
    return block


def _expand_preset(given: Mapping[str, Any], learning_rate: float | None) -> dict[str, Any]:
    block = dict(given)
    name = block.pop("preset", None)
    if name is None:
        return block
    fields.one_of(lambda: (*PRESETS, *PRESET_FUNCTIONS))(f"{BLOCK}.preset", name)
    if name in PRESETS:
        return {**PRESETS[name], **block}
    function = PRESET_FUNCTIONS[name]
    if "layer_decay" in block:  # the region's rate has a name of its own in this preset
        block.setdefault("lr_vit_layer_decay", block.pop("layer_decay"))
    own = {k: block.pop(k) for k in inspect.signature(function).parameters if k in block}
    for key, value in own.items():
        _PRESET_PARAMETERS[key](f"{BLOCK}.{key}", value)
    return {**function(learning_rate=learning_rate, **own), **block}


_PRESET_PARAMETERS: dict[str, fields.Check] = {
    "lr_encoder": _LR,
    "lr_vit_layer_decay": fields.number(0.0, 1.0, open_low=True),
    "lr_component_decay": fields.number(0.0, 1.0, open_low=True),
    "convention": fields.one_of(lambda: tuple(CONVENTIONS)),
    "out_feature_indexes": fields.integers(at_least=1),
}


def _region(index: int, raw: dict[str, Any], outer: DepthSettings) -> Region:
    own = {k: raw.pop(k) for k in _DEPTH_FIELDS if k in raw}
    if own.get("depth_strategy") == LAYER_DECAY:
        # A floor and a scope that were meant for a curve do not carry over to layer decay.
        own = {"min_depth_factor": None, "depth_scope": "stack", **own}
    depth = replace(outer, **own) if own else None
    path = f"{BLOCK}.regions[{index}]"
    if depth is not None:
        _check_depth(path, depth)
    if raw.get("lr") is not None and "lr_multiplier" in raw:
        raise ConfigError(f"Invalid {path}: 'lr' and 'lr_multiplier' exclude each other. Keep one.")
    return Region(depth=depth, **raw)


def _check_depth(path: str, depth: DepthSettings) -> None:
    if depth.depth_strategy == "table" and not depth.depth_table:
        raise ConfigError(
            f"Invalid {path}.depth_strategy='table': needs depth_table, a list of 2 or more"
            " factors."
        )
    if depth.depth_strategy == LAYER_DECAY and depth.depth_scope == "trunk":
        raise ConfigError(
            f"Invalid {path}.depth_scope='trunk': layer_decay numbers each stack. Remove"
            " depth_scope."
        )


def _check_components(block: PerLayerLR) -> None:
    named = {p.component for p in block.patterns}
    for i, region in enumerate(block.regions):
        fields.known_keys(
            f"{BLOCK}.regions[{i}].component_lr",
            region.component_lr or {},
            known_components() | named,
        )
    fields.known_keys(f"{BLOCK}.component_lr", block.component_lr, known_components() | named)
    listed = known_components() | {"default"} | block.component_lr.keys()
    for i, rule in enumerate(block.patterns):
        fields.one_of(lambda: tuple(sorted(listed)))(
            f"{BLOCK}.patterns[{i}].component", rule.component
        )
