"""Give every parameter its timing: the first rule that hits, else its region's. Pure."""

from __future__ import annotations

from dataclasses import replace

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.config import PLAN_BLOCK, PerLayerLR
from dist_layerlr.plan.name_rules import DEFAULT
from dist_layerlr.plan.placed import Placed
from dist_layerlr.plan.rules import Rules
from dist_layerlr.plan.timing import LAST, Timing, TimingRule, TimingSettings, settle

_EMBED = "embed"
"""Fine component of what runs before the first block."""


def timings(placed: list[Placed], rules: Rules, block: PerLayerLR) -> list[Placed]:
    """The parameters, each with its timing.

    Raises:
        ConfigError: a rule that hits nothing, or a window that never opens for some block.
    """
    regions = {id(region): number for number, region in enumerate(block.regions)}
    chosen: list[tuple[TimingSettings, str] | None] = [None] * len(placed)
    for number, rule in enumerate(block.timing):
        path = f"{PLAN_BLOCK}.timing[{number}]"
        named = rules.matching(rule.match, f"{path}.match")
        hits = list(filter(lambda i: _applies(rule, placed[i], block), named))
        if not hits:
            raise ConfigError(
                f"Invalid {path}: no parameter has its components {list(rule.components)} and its"
                f" depth {rule.depth}. Give what the grid of `dist-layerlr plan` shows."
            )
        for i in hits:
            chosen[i] = chosen[i] or (rule.settings, path)
    for i, p in enumerate(placed):
        if p.region is not None and chosen[i] is None:
            chosen[i] = p.region.timing, f"{PLAN_BLOCK}.regions[{regions[id(p.region)]}]"
    if not any(chosen):
        return placed
    if any(p.choice.optimizer is not None for p in placed):
        raise ConfigError(
            f"Invalid {PLAN_BLOCK}.timing beside 'optimizers': one that takes whole matrices steps"
            " all of its names at once. Remove 'optimizers', or the timings."
        )
    last = max(map(lambda p: _count(p, block), placed), default=0)
    return [
        p if found is None else replace(p, timing=_timing(p, *found, last, block))
        for p, found in zip(placed, chosen, strict=True)
    ]


def _applies(rule: TimingRule, p: Placed, block: PerLayerLR) -> bool:
    label = p.label
    mine = {label.component or DEFAULT, label.fine}
    if rule.components and not mine.intersection(rule.components):
        return False
    if rule.depth is None:
        return True
    if p.location is None:
        return False
    place, count = _place(p, block), _count(p, block)
    low, high = rule.depth
    return low <= (place / (count - 1) if count > 1 else 0.0) <= high


def _timing(
    p: Placed, settings: TimingSettings, path: str, last: int, block: PerLayerLR
) -> Timing | None:
    return settle(settings, _waits(p, settings, last, block), path)


def _waits(p: Placed, settings: TimingSettings, last: int, block: PerLayerLR) -> int:
    """How many blocks are unfrozen before a parameter.

    What lies outside blocks comes at once, a new head above all; embeddings count as what runs
    before the first block. Side branches have no place in the order.
    """
    if settings.unfreeze is None:
        return 0
    from_last = settings.unfreeze.start == LAST
    if p.location is None:
        return last if from_last and p.label.fine == _EMBED else 0
    if p.location.auxiliary:
        return 0
    return _count(p, block) - 1 - _place(p, block) if from_last else _place(p, block)


def _place(p: Placed, block: PerLayerLR) -> int:
    loc = p.location
    if loc is None:
        return 0
    return loc.trunk_block if block.depth.depth_scope == "trunk" else loc.block


def _count(p: Placed, block: PerLayerLR) -> int:
    loc = p.location
    if loc is None or loc.auxiliary:
        return 0 if loc is None else loc.blocks
    return loc.trunk_blocks if block.depth.depth_scope == "trunk" else loc.blocks
