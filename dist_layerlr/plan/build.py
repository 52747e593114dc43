"""Names and shapes -> plan: parse, locate, classify, weigh by depth, warn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan.advice import check_plan
from dist_layerlr.plan.components import Label, ParamView, classify, has_custom_rules
from dist_layerlr.plan.config import (
    PLAN_BLOCK,
    Config,
    PatternRule,
    PerLayerLR,
    load_config,
)
from dist_layerlr.plan.decay import weight_decays
from dist_layerlr.plan.depth import LAYER_DECAY, DepthSettings, depth_factor
from dist_layerlr.plan.entries import ParamInfo, Plan, PlanEntry, Shape
from dist_layerlr.plan.layer_decay import layer_decay_factors, note_by_name
from dist_layerlr.plan.name_rules import DEFAULT
from dist_layerlr.plan.names import ParamPath, canonical_name, module_index, parse
from dist_layerlr.plan.optimizers import Candidate, Choice, Optimizers, choose
from dist_layerlr.plan.placed import Placed
from dist_layerlr.plan.rules import Rules
from dist_layerlr.plan.scaling import scaled
from dist_layerlr.plan.stacks import Location, StackMap
from dist_layerlr.plan.timings import timings

Params = Iterable[ParamInfo] | Mapping[str, Shape] | Iterable[tuple[str, Shape]]


def build_plan(
    params: Params, config: Config | Mapping[str, Any] | str | Path, *, base: Params | None = None
) -> Plan:
    """Give every trainable parameter its learning rate and weight decay.

    Args:
        params: ALL parameters of the model, frozen ones included (they decide block counts):
            ``{name: shape}``, pairs, or ``ParamInfo``.
        config: the training config (mapping or JSON file) with its ``per_layer_lr`` block.
        base: the full model's parameters, when ``params`` is only the trainable list (a LoRA file).

    Raises:
        ConfigError: bad config, or a pattern, region or decay rule that matches nothing.
        ModelSourceError: duplicate names, no names, or flattened names without ``base``.
        UnmatchedParams: ``unmatched: error`` and a trainable parameter that no rule names.
    """
    config = load_config(config)
    infos = _infos(params)
    whole = _infos(base) if base is not None else None
    if not config.per_layer_lr.enabled:
        return _flat_plan(infos, whole, config)
    # Frozen parameters are placed as well: layer decay numbers the layers of the whole model.
    placed, decay, notes = _place(infos, whole, config)
    factors = _depth_factors(placed, config.per_layer_lr, notes)
    entries = {
        p.info.name: _entry(p, factor, wd, config.per_layer_lr)
        for p, factor, wd in zip(placed, factors, decay, strict=True)
        if p.info.trainable
    }
    entries = scaled(entries, placed, config.width_scaling)
    if base is None and all(p.path.is_adapter for p in placed):
        notes.append(
            "only adapter parameters are listed: block counts come from them alone; give the full"
            " model (--base)"
        )
    return Plan(
        entries=entries,
        config=config,
        frozen=len(placed) - len(entries),
        warnings=(*notes, *check_plan(entries, config)),
    )


def _infos(params: Params) -> list[ParamInfo]:
    if isinstance(params, Mapping):
        params = params.items()
    infos: dict[str, ParamInfo] = {}
    for item in params:
        info = (
            item if isinstance(item, ParamInfo) else ParamInfo(name=item[0], shape=tuple(item[1]))
        )
        name = canonical_name(info.name)
        if name in infos:
            raise ModelSourceError(
                f"Parameter {name!r} is listed twice. Names must be unique once wrappers are"
                " undone."
            )
        if name != info.name:
            info = replace(info, name=name)
        infos[name] = info
    if not infos:
        raise ModelSourceError("The model has no parameters. Give all of its names and shapes.")
    return list(infos.values())


def _flat_plan(infos: list[ParamInfo], base: list[ParamInfo] | None, config: Config) -> Plan:
    # Optimizers and widths ask for component and block, equal rates or not.
    asked = config.optimizers is not None or config.width_scaling is not None
    placed = _place(infos, base, config)[0] if asked else []
    choices = [p.choice for p in placed] or [Choice()] * len(infos)
    entries = {
        i.name: PlanEntry(
            name=i.name,
            shape=i.shape,
            component=DEFAULT,
            rule="per_layer_lr is off",
            stack=None,
            block=None,
            blocks=None,
            panel=None,
            base_lr=config.flat_lr,
            factor=1.0,
            depth=None,
            multiplier=1.0,
            lora_plus=1.0,
            lr=config.flat_lr * choice.multiplier,
            weight_decay=choice.weight_decay,
            region=None,
            optimizer=choice.optimizer,
            optimizer_why=choice.why,
            optimizer_multiplier=choice.multiplier,
            parts=choice.parts,
        )
        for i, choice in zip(infos, choices, strict=True)
        if i.trainable
    }
    entries = scaled(entries, placed, config.width_scaling)
    return Plan(entries=entries, config=config, frozen=len(infos) - len(entries))


def _place(
    infos: list[ParamInfo], base: list[ParamInfo] | None, config: Config
) -> tuple[list[Placed], list[float | None], list[str]]:
    """Locate and label every parameter and give it its weight decay.

    The first matching region and pattern win.
    """
    block = config.per_layer_lr
    base_paths = [parse(i.name) for i in (infos if base is None else base)]
    # Block counts are the base's, where one is given: an adapter on three blocks of 48 would make a
    # model of three, and other depth factors.
    stack_map = StackMap(base_paths)
    base_locations = [stack_map.locate(p) for p in base_paths]
    siblings = _siblings(base_paths, base_locations)
    paths, locations = base_paths, base_locations
    if base is not None:
        # kohya joins a path with underscores (`lora_unet_blocks_0_to_q`): only the modules of the
        # base tell which of them were dots.
        index = module_index(base_paths)
        paths = [parse(i.name, index) for i in infos]
        locations = [stack_map.locate(p) for p in paths]
    rules = Rules(infos, paths)
    patterns = rules.first_match(block.patterns, f"{PLAN_BLOCK}.patterns")
    regions = rules.first_match(block.regions, f"{PLAN_BLOCK}.regions")
    label, chosen = _Labeller(siblings), _chooser(config.optimizers, infos, paths, rules)
    placed: list[Placed] = []
    for info, path, loc, pattern, region in zip(
        infos, paths, locations, patterns, regions, strict=True
    ):
        found = Placed(
            info=info, path=path, location=loc, label=label(info, path, loc, pattern), region=region
        )
        placed.append(replace(found, choice=chosen(found)))
    placed = timings(placed, rules, block)
    return placed, weight_decays(placed, rules, block), rules.notes


def _chooser(
    given: Optimizers | None, infos: list[ParamInfo], paths: list[ParamPath], rules: Rules
) -> Callable[[Placed], Choice]:
    """Which optimizer steps a parameter. A pattern that matches nothing is refused."""
    # The parts of a fused matrix are told from the matrices beside it; an adapter's pair is none.
    shapes = {p.base_name: i.shape for i, p in zip(infos, paths, strict=True) if not p.is_adapter}
    for name, rule in given.rules.items() if given is not None else ():
        for number, pattern in enumerate(rule.match):
            rules.matching(pattern, f"optimizers.{name}.match[{number}]")

    def chosen(p: Placed) -> Choice:
        asked = Candidate(
            name=p.info.name,
            shape=p.info.shape,
            path=p.path,
            label=p.label,
            in_block=p.location is not None,
            owner_class=p.info.owner_class,
        )
        return choose(given, asked, shapes)

    return chosen


Siblings = dict[tuple[str, int], frozenset[str]]


def _siblings(paths: list[ParamPath], locations: list[Location | None]) -> Siblings:
    """All segments found in each block; blocks that look alike share one set."""
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for path, loc in zip(paths, locations, strict=True):
        if loc is not None:
            found[loc.stack, loc.block].update(path.owner[loc.depth :])
    # Equal sets become one object: `_Labeller` compares one for every parameter, and identical
    # objects compare without a look at their members.
    shared: dict[frozenset[str], frozenset[str]] = {}
    return {
        key: shared.setdefault(frozenset(segments), frozenset(segments))
        for key, segments in found.items()
    }


class _Labeller:
    """Classifies once per distinct place below a block, which 48 equal blocks share."""

    def __init__(self, siblings: Siblings):
        self._siblings = siblings
        self._known: dict[Any, Label] = {}

    def __call__(
        self, info: ParamInfo, path: ParamPath, loc: Location | None, pattern: PatternRule | None
    ) -> Label:
        below = path.owner if loc is None else path.owner[loc.depth :]
        siblings: frozenset[str] = (
            frozenset() if loc is None else self._siblings.get((loc.stack, loc.block), frozenset())
        )
        # A registered rule may look at the whole name, so its answers are not shared.
        key = (
            info.name
            if has_custom_rules()
            else (below, path.leaf, loc is None, info.owner_class, siblings)
        )
        label = self._known.get(key)
        if label is None:
            view = ParamView(
                name=info.name,
                path=below,
                leaf=path.leaf,
                inside=loc is not None,
                is_adapter=path.is_adapter,
                owner_class=info.owner_class,
                siblings=siblings,
            )
            label = self._known[key] = classify(view)
        # A pattern has the last word on the component, so no fine label goes with it that could
        # replace it; `is_norm` stays, for the `norm` rule of no_decay.
        if pattern is not None:
            return Label(
                component=pattern.component,
                rule=f"pattern {pattern.match!r}",
                is_norm=label.is_norm,
            )
        return label


def _depth_factors(placed: list[Placed], block: PerLayerLR, notes: list[str]) -> list[float]:
    """One factor per parameter; layer decay numbers the whole scope (model or region) at once."""
    scopes: dict[int, list[int]] = defaultdict(list)
    settings: dict[int, DepthSettings] = {}
    for i, p in enumerate(placed):
        # Told apart by identity, not by value: two regions with equal settings are two scopes, and
        # a region without a depth of its own is numbered with the block's.
        own = _depth_of(p, block)
        scopes[id(own)].append(i)
        settings[id(own)] = own
    factors = [1.0] * len(placed)
    for key, members in scopes.items():
        own = settings[key]
        if own.depth_strategy == LAYER_DECAY:
            values = _decayed([placed[i] for i in members], own, notes)
        else:
            values = [
                _curve_factor(placed[i].location, own, asked=own is not block.depth)
                for i in members
            ]
        for i, value in zip(members, values, strict=True):
            factors[i] = value
    return factors


def _decayed(members: list[Placed], settings: DepthSettings, notes: list[str]) -> list[float]:
    """Layer decay of one scope; what names alone could not tell is noted."""
    places = [(p.path, p.location) for p in members]
    own = [p.info.layer for p in members]
    convention, num_layers = settings.convention, settings.num_layers
    note = note_by_name(places, convention=convention, num_layers=num_layers, own=own)
    if note is not None:
        notes.append(note)
    return layer_decay_factors(
        places,
        rate=settings.layer_decay,
        convention=convention,
        num_layers=num_layers,
        floor=settings.min_depth_factor or 0.0,
        own=own,
    )


def _depth_of(p: Placed, block: PerLayerLR) -> DepthSettings:
    """The depth settings in force for a parameter."""
    return p.region.depth if p.region is not None and p.region.depth is not None else block.depth


def _curve_factor(loc: Location | None, settings: DepthSettings, *, asked: bool) -> float:
    """1.0 outside blocks, and in auxiliary stacks unless a region asks for depth there."""
    if loc is None or (loc.auxiliary and not asked):
        return 1.0
    if settings.depth_scope == "trunk":
        return depth_factor(loc.trunk_block, loc.trunk_blocks, settings)
    return depth_factor(loc.block, loc.blocks, settings)


def _entry(p: Placed, factor: float, weight_decay: float | None, block: PerLayerLR) -> PlanEntry:
    rates, fallback = block.component_lr, block.default_lr
    multiplier = 1.0
    if p.region is not None:
        if p.region.lr is not None:
            # The block's table must take nothing out of a region of one absolute rate.
            rates, fallback = {}, p.region.lr
        rates = p.region.component_lr if p.region.component_lr is not None else rates
        multiplier = p.region.lr_multiplier
    # A fine label (modulation, embed ...) counts only where the rates list it; whoever has not
    # heard of it gets the rate of the coarse component.
    component = p.label.fine if p.label.fine in rates else p.label.component
    base_lr = rates.get(component or DEFAULT, fallback)
    lora_plus = block.lora_plus_ratio if p.path.is_lora_b else 1.0
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
        depth=_depth_of(p, block),
        multiplier=multiplier,
        lora_plus=lora_plus,
        # The order of these products is part of every digest, which has all digits of the rate:
        # another order rounds otherwise, and would look like another plan.
        lr=base_lr * factor * multiplier * lora_plus * p.choice.multiplier,
        weight_decay=weight_decay,
        region=p.region.match if p.region else None,
        optimizer=p.choice.optimizer,
        optimizer_why=p.choice.why,
        optimizer_multiplier=p.choice.multiplier,
        parts=p.choice.parts,
        timing=p.timing,
    )
