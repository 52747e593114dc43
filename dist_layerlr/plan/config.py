"""The ``per_layer_lr`` block: frozen dataclasses, and a reader that rejects what it does not know.

Every error names the field, the value, what is allowed, and the nearest key when one was misspelt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting
from dist_layerlr.files import read_config
from dist_layerlr.plan.components import known_components
from dist_layerlr.plan.depth import LAYER_DECAY, DepthSettings
from dist_layerlr.plan.optimizers import OPTIMIZERS, OPTIMIZERS_BLOCK, Optimizers
from dist_layerlr.plan.patterns import PATTERN
from dist_layerlr.plan.presets import PRESET_CLASSES, PRESETS
from dist_layerlr.plan.timing import RULES, TimingRule, TimingSettings, pop_settings, settle
from dist_layerlr.plan.width import WIDTH, WIDTH_BLOCK, WidthScaling

# Every config without a table shares this one, so nobody may write into it.
SEED_COMPONENT_LR: Mapping[str, float] = MappingProxyType(
    {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5}
)
"""component_lr when the key is absent. A key that is present means exactly what it lists."""
FALLBACK_LR = 3e-4
"""default_lr when neither it nor learning_rate is given."""
PLAN_BLOCK = "per_layer_lr"


_LR = fields.number(0.0)


def _parse_no_decay(path: str, value: object) -> tuple[str, ...]:
    rules = fields.strings(path, value)
    for rule in rules:
        # The two words are rules of their own; all else must compile as a pattern here, before a
        # model is read.
        if rule not in ("ndim<=1", "norm"):
            PATTERN(path, rule)
    return rules


_NO_DECAY = fields.Check(
    _parse_no_decay,
    "a list of name patterns, `ndim<=1` (true shape) or `norm` (owner is a norm)",
    fields.strings.schema,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternRule:
    """A user rule that names the component of the parameters it matches."""

    match: str = setting(PATTERN, doc="Which parameters.")
    component: str = setting(fields.text, doc="Their component.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of the model with rules of its own.

    What it does not give, it takes from the block around it.
    """

    match: str = setting(PATTERN, doc="Which parameters.")
    lr: float | None = setting(
        _LR,
        default=None,
        shown="the block's rates",
        doc="Absolute rate before depth; replaces component_lr and default_lr inside the region."
        " Excludes `lr_multiplier`.",
    )
    lr_multiplier: float = setting(_LR, default=1.0, doc="Multiplies the rates inside the region.")
    component_lr: Mapping[str, float] | None = setting(
        fields.mapping_of(_LR),
        default=None,
        shown="the block's",
        doc="As the block's, for this region.",
    )
    depth: DepthSettings | None = None
    """None: the depth of the block around it, numbered with it."""
    weight_decay: float | None = setting(
        _LR, default=None, shown="the block's", doc="Of this region."
    )
    no_decay: tuple[str, ...] | None = setting(
        _NO_DECAY, default=None, shown="the block's", doc="As the block's, for this region."
    )
    timing: TimingSettings = TimingSettings()
    """Its fields stand in the region itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerLR:
    """A validated ``per_layer_lr`` block. LRs are absolute, factors dimensionless."""

    enabled: bool = setting(
        fields.boolean, default=False, doc="false, or no block: one flat `learning_rate`."
    )
    component_lr: Mapping[str, float] = setting(
        fields.mapping_of(_LR),
        factory=lambda: SEED_COMPONENT_LR,
        shown="self_attn 4e-4, cross_attn 2e-4, ffn 3e-4, norm 5e-5",
        doc="Rate by component. A block that is given means exactly what it lists.",
    )
    default_lr: float = setting(
        _LR,
        default=FALLBACK_LR,
        shown="`learning_rate`, else 3e-4",
        doc="Rate of whatever no listed component takes.",
    )
    depth: DepthSettings = field(default_factory=DepthSettings)
    """Its fields stand in the block itself."""
    patterns: tuple[PatternRule, ...] = setting(
        fields.list_of(PatternRule),
        default=(),
        doc="Components of your own, {match, component}; section 5.",
    )
    regions: tuple[Region, ...] = setting(
        fields.list_of(Region, DepthSettings, TimingSettings),
        default=(),
        doc="Parts of the model with rules of their own, {match, ...}; section 6.",
    )
    timing: tuple[TimingRule, ...] = setting(
        RULES,
        default=(),
        doc="When parameters train, {match, components, depth, from, until ...}; section 12.",
    )
    weight_decay: float | None = setting(
        _LR, default=None, shown="the optimizer's", doc="Of every planned parameter."
    )
    no_decay: tuple[str, ...] = setting(_NO_DECAY, default=(), doc="What has weight decay 0.")
    lora_plus_ratio: float = setting(
        fields.number(1.0), default=1.0, doc="Rate of lora_B over the rate of lora_A."
    )
    unmatched: str = setting(
        fields.one_of(lambda: ("default", "warn", "error")),
        default="warn",
        doc="What happens to a trainable parameter that no rule names.",
    )
    log_grad_norms: bool = setting(
        fields.boolean,
        default=False,
        doc="The trainer measures each cell of the grid: rate, gradient norm, weight norm, ratio of"
        " update to weight (`docs/launching.md`).",
    )
    resume_lr: str = setting(
        fields.one_of(lambda: ("plan", "checkpoint")),
        default="plan",
        doc="Whose rates apply after a resume: the new plan's, or the checkpoint's"
        " (`docs/checkpoints.md`).",
    )


PRESET = fields.Setting(
    key="preset",
    name="preset",
    check=fields.one_of(lambda: (*PRESETS, *PRESET_CLASSES)),
    doc="Settings by name, section 8; any field beside it overrides it, whole.",
    default="none",
)
"""A key of the block, but no field of ``PerLayerLR``: it is replaced by what it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What a plan is made from: the training config's own fields that matter to learning rates."""

    comment: str = setting(
        fields.text, default="", shown="none", doc="For whoever reads the file; nothing uses it."
    )
    schema: str = setting(
        fields.text,
        default="",
        shown="none",
        key="$schema",
        doc="Where editors find the schema of this file; nothing else uses it.",
    )
    model_type: str = setting(fields.text, default="model", doc="Name of the model's family.")
    learning_rate: float | None = setting(
        _LR, default=None, shown="3e-4", doc="The flat rate, and `default_lr` of the block."
    )
    optimizers: Optimizers | None = setting(
        OPTIMIZERS,
        default=None,
        shown="one optimizer for all",
        doc="Which optimizer steps which parameters: `docs/names.md`, section 10.",
    )
    width_scaling: WidthScaling | None = setting(
        WIDTH,
        default=None,
        shown="rates as written",
        doc="Rates found on a small model, carried to this one: `docs/names.md`, section 11.",
    )
    per_layer_lr: PerLayerLR = field(default_factory=PerLayerLR)

    @property
    def flat_lr(self) -> float:
        """The one LR when per_layer_lr is off."""
        return FALLBACK_LR if self.learning_rate is None else self.learning_rate


def load_config(source: str | Path | Mapping[str, Any] | Config) -> Config:
    """Read a training config: a JSON file or the mapping it holds.

    Keys of the trainer's own are left alone.

    Raises:
        ConfigError: unreadable file, unknown key or bad value in ``per_layer_lr``, or a misspelt
            top-level key.
    """
    if isinstance(source, Config):
        return source
    raw = source if isinstance(source, Mapping) else read_config(source)
    known = fields.settings(Config)
    # The trainer's own block `optimizer` is no misspelling of `optimizers`.
    fields.near_misses("config", [key for key in raw if key != "optimizer"], (PLAN_BLOCK, *known))
    _check_nested(raw)
    # A config may say `"learning_rate": null`: the trainer's own default then holds.
    given = {key: raw[key] for key in known if key in raw}
    if given.get("learning_rate") is None:
        given.pop("learning_rate", None)
    values = {known[key].name: known[key].check(key, value) for key, value in given.items()}
    block = _read_block(raw.get(PLAN_BLOCK), values.get("learning_rate"))
    _check_optimizers(values.get(OPTIMIZERS_BLOCK), block)
    if values.get(WIDTH_BLOCK) is not None and values.get(OPTIMIZERS_BLOCK) is not None:
        raise ConfigError(
            f"Invalid {WIDTH_BLOCK}: its rules are Adam's, and {OPTIMIZERS_BLOCK!r} gives matrices"
            " to another optimizer. Keep one of the two."
        )
    return Config(**values, per_layer_lr=block)


def _check_nested(raw: Mapping[str, Any]) -> None:
    """Refuse a config whose rates stand beside the block's place, where nobody would read them."""
    own = fields.settings(PerLayerLR, DepthSettings).keys() | {PRESET.key}
    # weight_decay alone may be the trainer's own.
    if PLAN_BLOCK in raw or not raw.keys() & (own - {"weight_decay"}):
        return
    found = sorted(raw.keys() & own)
    raise ConfigError(
        f"Invalid config: {found} must stand inside a {PLAN_BLOCK!r} block, beside 'learning_rate'."
    )


def _read_block(raw: object, learning_rate: float | None) -> PerLayerLR:
    fallback = FALLBACK_LR if learning_rate is None else learning_rate
    if raw is None:
        return PerLayerLR(default_lr=fallback)
    given = _expand_preset(fields.mapping(PLAN_BLOCK, raw), learning_rate)
    depth_keys = fields.settings(DepthSettings)
    fields.known_keys(PLAN_BLOCK, given, [*fields.settings(PerLayerLR), *depth_keys, PRESET.key])
    values = fields.read(PLAN_BLOCK, given, PerLayerLR, DepthSettings)
    depth = DepthSettings(**{key: values.pop(key) for key in depth_keys if key in values})
    _check_depth(PLAN_BLOCK, depth)
    values.setdefault("default_lr", fallback)
    regions = tuple(_region(i, r, depth) for i, r in enumerate(values.pop("regions", ())))
    patterns = tuple(PatternRule(**p) for p in values.pop("patterns", ()))
    block = PerLayerLR(depth=depth, regions=regions, patterns=patterns, **values)
    _check_components(block)
    return block


def _expand_preset(given: Mapping[str, Any], learning_rate: float | None) -> dict[str, Any]:
    """Replace ``preset`` by its settings; those of the user beside it win."""
    block = dict(given)
    name = block.pop(PRESET.key, None)
    if name is None:
        return block
    PRESET.check(f"{PLAN_BLOCK}.{PRESET.key}", name)
    if name in PRESETS:
        # Fields are replaced, not merged: a merged table would have rates that the user never
        # wrote.
        return {**PRESETS[name], **block}
    preset = PRESET_CLASSES[name]
    # The encoder's decay has a name of its own in this preset, but users write the general one.
    if "layer_decay" in block:
        block.setdefault("lr_vit_layer_decay", block.pop("layer_decay"))
    own = {key: block.pop(key) for key in fields.settings(preset) if key in block}
    parsed = preset(**fields.read(PLAN_BLOCK, own, preset))
    return {**parsed.block(learning_rate), **block}


def _region(index: int, raw: dict[str, Any], outer: DepthSettings) -> Region:
    """One region, with a depth of its own where it gives any field of one."""
    own = {k: raw.pop(k) for k in fields.settings(DepthSettings) if k in raw}
    if own.get("depth_strategy") == LAYER_DECAY:
        # A floor and a scope that were meant for a curve do not carry over to layer decay.
        own = {"min_depth_factor": None, "depth_scope": "stack", **own}
    timing = pop_settings(raw)
    # What the region does not say of its curve is the block's. None is no copy of the block's
    # depth: by that object a region is numbered together with the block.
    depth = replace(outer, **own) if own else None
    path = f"{PLAN_BLOCK}.regions[{index}]"
    if depth is not None:
        _check_depth(path, depth)
    settle(timing, 0, path)
    # Asked of what was written: the parsed multiplier has a default, which would look given.
    if raw.get("lr") is not None and "lr_multiplier" in raw:
        raise ConfigError(f"Invalid {path}: 'lr' and 'lr_multiplier' exclude each other. Keep one.")
    return Region(depth=depth, timing=timing, **raw)


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


def _check_optimizers(given: Optimizers | None, block: PerLayerLR) -> None:
    """Refuse components that nothing gives: their matrices would go to the rest, unnoticed."""
    known = known_components() | {p.component for p in block.patterns} | {"default"}
    for name, rule in given.rules.items() if given is not None else ():
        fields.known_keys(f"{OPTIMIZERS_BLOCK}.{name}.components", rule.components, known)


def _check_components(block: PerLayerLR) -> None:
    """Refuse component names that nothing gives: rates under a misspelt name would be lost."""
    # A pattern makes a component: its name is known wherever rates are listed.
    named = {p.component for p in block.patterns}
    for i, region in enumerate(block.regions):
        fields.known_keys(
            f"{PLAN_BLOCK}.regions[{i}].component_lr",
            region.component_lr or {},
            known_components() | named,
        )
    fields.known_keys(f"{PLAN_BLOCK}.component_lr", block.component_lr, known_components() | named)
    # A pattern may also give what component_lr alone names, which is how a component of one's own
    # gets its rate.
    listed = known_components() | {"default"} | block.component_lr.keys()
    for i, rule in enumerate(block.patterns):
        # `one_of` takes a function: rules that users register add to what is allowed.
        fields.one_of(lambda: tuple(sorted(listed)))(
            f"{PLAN_BLOCK}.patterns[{i}].component", rule.component
        )
