"""Names and shapes -> plan: parse, locate, classify, weigh by depth, warn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_layerlr.components import DEFAULT, NORM, Label, ParamView, classify, has_custom_rules
from dist_layerlr.config import BLOCK, Config, PatternRule, PerLayerLR, Region, load_config
from dist_layerlr.depth import LAYER_DECAY, DepthSettings, depth_factor
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.layer_decay import layer_decay_factors
from dist_layerlr.names import ParamPath, canonical_name, module_index, parse
from dist_layerlr.patterns import compile_pattern, nearest
from dist_layerlr.plan import ParamInfo, Plan, PlanEntry, Shape
from dist_layerlr.stacks import Location, StackMap
from dist_layerlr.warn import check_plan

Params = Iterable[ParamInfo] | Mapping[str, Shape] | Iterable[tuple[str, Shape]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placed:
    """A parameter with everything that does not depend on the rates."""

    info: ParamInfo
    path: ParamPath
    location: Location | None
    label: Label
    region: Region | None


def build_plan(params: Params, config: Config | Mapping[str, Any] | str | Path, *, base: Params | None = None) -> Plan:
    """Give every trainable parameter its learning rate and weight decay.

    Args:
        params: ALL parameters of the model, frozen ones included (they decide block counts): ``{name: shape}``, pairs,
            or ``ParamInfo``.
        config: the training config (mapping or JSON file) with its ``per_layer_lr`` block.
        base: the full model's parameters, when ``params`` is only the trainable list (a LoRA file).

    Raises:
        ConfigError: bad config, or a pattern, region or decay rule that matches nothing.
        ModelSourceError: duplicate names, no names, or flattened names without ``base``.
        UnmatchedParams: ``unmatched: error`` and a trainable parameter that no rule names.
    """
    config = load_config(config)
    infos = _infos(params)
    if not config.per_layer_lr.enabled:
        return _flat_plan(infos, config)
    placed = _place(infos, _infos(base) if base is not None else None, config.per_layer_lr)
    factors = _depth_factors(placed, config.per_layer_lr.depth)
    decay = _decay_rules(placed, config.per_layer_lr)
    entries = {
        p.info.name: _entry(p, factor, wd, config.per_layer_lr)
        for p, factor, wd in zip(placed, factors, decay, strict=True)
        if p.info.trainable
    }
    frozen = len(placed) - len(entries)
    notes = (*_notes(placed, config.per_layer_lr, alone=base is None), *check_plan(entries, config))
    return Plan(entries=entries, config=config, frozen=frozen, warnings=notes)


def _notes(placed: list[_Placed], block: PerLayerLR, *, alone: bool) -> list[str]:
    """Warnings that need more than the finished entries."""
    notes = []
    if alone and all(p.path.is_adapter for p in placed):
        notes.append(
            "only adapter parameters are listed: block counts come from them alone; give the full model (--base)"
        )
    for region in block.regions:
        members = [p for p in placed if p.region is region]
        if members and not any(p.info.trainable for p in members):
            notes.append(f"region {region.match!r} matches frozen parameters only")
    return notes


def _infos(params: Params) -> list[ParamInfo]:
    if isinstance(params, Mapping):
        params = params.items()
    infos: dict[str, ParamInfo] = {}
    for item in params:
        info = item if isinstance(item, ParamInfo) else ParamInfo(name=item[0], shape=tuple(item[1]))
        name = canonical_name(info.name)
        if name in infos:
            raise ModelSourceError(
                f"Parameter {name!r} is listed twice. Names must be unique once wrappers are undone."
            )
        if name != info.name:
            info = ParamInfo(name=name, shape=info.shape, trainable=info.trainable, owner_class=info.owner_class)
        infos[name] = info
    if not infos:
        raise ModelSourceError("The model has no parameters. Give all of its names and shapes.")
    return list(infos.values())


def _flat_plan(infos: list[ParamInfo], config: Config) -> Plan:
    lr = config.flat_lr
    entries = {
        i.name: PlanEntry(
            name=i.name, shape=i.shape, component=DEFAULT, rule="per_layer_lr is off", stack=None, block=None,
            blocks=None, panel=None, base_lr=lr, factor=1.0, scale=1.0, lr=lr, weight_decay=None, region=None,
        )
        for i in infos
        if i.trainable
    }  # fmt: skip
    return Plan(entries=entries, config=config, frozen=len(infos) - len(entries))


def _place(infos: list[ParamInfo], base: list[ParamInfo] | None, block: PerLayerLR) -> list[_Placed]:
    """Locate and label every parameter; the first matching region and pattern win."""
    base_paths = [parse(i.name) for i in (infos if base is None else base)]
    stack_map = StackMap(base_paths)
    base_locations = [stack_map.locate(p) for p in base_paths]
    siblings = _siblings(base_paths, base_locations)
    paths, locations = base_paths, base_locations
    if base is not None:
        index = module_index(base_paths)
        paths = [parse(i.name, index) for i in infos]
        locations = [stack_map.locate(p) for p in paths]
    patterns = _first_match(infos, paths, block.patterns, "patterns")
    regions = _first_match(infos, paths, block.regions, "regions")
    label = _Labeller(siblings)
    return [
        _Placed(info=info, path=path, location=loc, label=label(info, path, loc, pattern), region=region)
        for info, path, loc, pattern, region in zip(infos, paths, locations, patterns, regions, strict=True)
    ]


Siblings = dict[tuple[str, int], frozenset[str]]


def _siblings(paths: list[ParamPath], locations: list[Location | None]) -> Siblings:
    """All segments found in each block; blocks that look alike share one set."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for path, loc in zip(paths, locations, strict=True):
        if loc is not None:
            found[loc.stack, loc.block].update(path.owner[loc.depth :])
    shared: dict[frozenset[str], frozenset[str]] = {}
    return {key: shared.setdefault(frozenset(segments), frozenset(segments)) for key, segments in found.items()}


class _Labeller:
    """Classifies once per distinct place below a block, which 48 equal blocks share."""

    def __init__(self, siblings: Siblings):
        self._siblings = siblings
        self._known: dict[Any, Label] = {}

    def __call__(self, info: ParamInfo, path: ParamPath, loc: Location | None, pattern: PatternRule | None) -> Label:
        if pattern is not None:
            return Label(component=pattern.component, rule=f"pattern {pattern.match!r}")
        below = path.owner if loc is None else path.owner[loc.depth :]
        siblings: frozenset[str] = (
            frozenset() if loc is None else self._siblings.get((loc.stack, loc.block), frozenset())
        )
        # A registered rule may look at the whole name, so its answers are not shared.
        key = info.name if has_custom_rules() else (below, path.leaf, loc is None, info.owner_class, siblings)
        label = self._known.get(key)
        if label is None:
            view = ParamView(
                name=info.name, path=below, leaf=path.leaf, inside=loc is not None, is_adapter=path.is_adapter,
                owner_class=info.owner_class, siblings=siblings,
            )  # fmt: skip
            label = self._known[key] = classify(view)
        return label


def _first_match(infos: list[ParamInfo], paths: list[ParamPath], rules: Sequence[Any], what: str) -> list[Any]:
    """For each parameter the first rule that matches its name, or its name in the base model.

    A rule that matches no parameter at all is an error.
    """
    if not rules:
        return [None] * len(infos)
    hits = [False] * len(rules)
    matchers = [compile_pattern(rule.match) for rule in rules]
    chosen: list[Any] = []
    for info, path in zip(infos, paths, strict=True):
        resolved = ".".join((*path.owner, path.leaf))
        matched = [i for i, matches in enumerate(matchers) if matches(info.name) or matches(resolved)]
        for i in matched:
            hits[i] = True
        chosen.append(rules[matched[0]] if matched else None)
    for i, hit in enumerate(hits):
        if not hit:
            raise _no_match(f"{BLOCK}.{what}[{i}].match", rules[i].match, infos)
    return chosen


def _no_match(field: str, pattern: str, infos: list[ParamInfo]) -> ConfigError:
    near = nearest(pattern, (i.name for i in infos))
    hint = f" Nearest names: {', '.join(near)}." if near else f" The first name is {infos[0].name!r}."
    return ConfigError(
        f"Invalid {field}={pattern!r}: it matches no parameter.{hint} "
        "A glob starts at the first segment; '*.' in front matches at any depth."
    )


def _depth_factors(placed: list[_Placed], outer: DepthSettings) -> list[float]:
    """One factor per parameter; layer decay numbers the whole scope (model or region) at once."""
    scopes: dict[int, list[int]] = defaultdict(list)
    settings: dict[int, DepthSettings] = {}
    for i, p in enumerate(placed):
        own = p.region.depth if p.region is not None and p.region.depth is not None else outer
        scopes[id(own)].append(i)
        settings[id(own)] = own
    factors = [1.0] * len(placed)
    for key, members in scopes.items():
        own = settings[key]
        if own.depth_strategy == LAYER_DECAY:
            values = layer_decay_factors([(placed[i].path, placed[i].location) for i in members], own)
        else:
            values = [_curve_factor(placed[i].location, own, asked=own is not outer) for i in members]
        for i, value in zip(members, values, strict=True):
            factors[i] = value
    return factors


def _curve_factor(loc: Location | None, settings: DepthSettings, *, asked: bool) -> float:
    """1.0 outside blocks, and in auxiliary stacks unless a region asks for depth there."""
    if loc is None or (loc.auxiliary and not asked):
        return 1.0
    if settings.depth_scope == "trunk":
        return depth_factor(loc.trunk_block, loc.trunk_blocks, settings)
    return depth_factor(loc.block, loc.blocks, settings)


def _decay_rules(placed: list[_Placed], block: PerLayerLR) -> list[float | None]:
    """Weight decay of each parameter: 0 where a no_decay rule hits, else the region's, the block's or None."""
    hits: dict[tuple[str, ...], set[str]] = defaultdict(set)
    values: list[float | None] = []
    for p in placed:
        region = p.region
        rules = region.no_decay if region is not None and region.no_decay is not None else block.no_decay
        own = region.weight_decay if region is not None and region.weight_decay is not None else block.weight_decay
        matched = {rule for rule in rules if _decay_rule_hits(rule, p)}
        hits[rules] |= matched
        values.append(0.0 if matched else own)
    for rules, found in hits.items():
        for rule in rules:
            if rule not in found and rule not in ("ndim<=1", "norm"):
                raise _no_match(f"{BLOCK}.no_decay", rule, [p.info for p in placed])
    return values


def _decay_rule_hits(rule: str, p: _Placed) -> bool:
    if rule == "ndim<=1":
        return len(p.info.shape) <= 1
    if rule == "norm":
        return p.label.component == NORM and p.label.fine is None
    return compile_pattern(rule)(p.info.name)


def _entry(p: _Placed, factor: float, weight_decay: float | None, block: PerLayerLR) -> PlanEntry:
    rates, fallback = block.component_lr, block.default_lr
    scale = 1.0
    if p.region is not None:
        if p.region.lr is not None:
            rates, fallback = {}, p.region.lr
        rates = p.region.component_lr if p.region.component_lr is not None else rates
        scale = p.region.lr_multiplier
    component = p.label.fine if p.label.fine in rates else p.label.component
    base_lr = rates.get(component or DEFAULT, fallback)
    if p.path.is_lora_b:
        scale *= block.lora_plus_ratio
    loc = p.location
    return PlanEntry(
        name=p.info.name,
        shape=p.info.shape,
        component=component or DEFAULT,
        rule=p.label.rule,
        stack=loc.stack if loc else None,
        block=loc.block if loc else None,
        blocks=loc.blocks if loc else None,
        panel=loc.panel if loc else None,
        base_lr=base_lr,
        factor=factor,
        scale=scale,
        lr=base_lr * factor * scale,
        weight_decay=weight_decay,
        region=p.region.match if p.region else None,
    )
