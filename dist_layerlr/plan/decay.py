"""Weight decay of each parameter, and the rules that exempt some from it. Pure."""

from __future__ import annotations

from dist_layerlr.plan.config import PLAN_BLOCK, PerLayerLR
from dist_layerlr.plan.placed import Placed
from dist_layerlr.plan.rules import Rules


def weight_decays(placed: list[Placed], rules: Rules, block: PerLayerLR) -> list[float | None]:
    """Weight decay of each parameter: 0 where a no_decay rule hits, else the region's or block's.

    None: the optimizer's own.
    """
    # The block's list is applied even if every region has its own: a rule in it that matches
    # nothing must be refused all the same.
    outer = _exempt(placed, rules, block.no_decay, f"{PLAN_BLOCK}.no_decay")
    exempt: dict[int, set[int]] = {}
    for number, region in enumerate(block.regions):
        if region.no_decay is not None:
            exempt[id(region)] = _exempt(
                placed, rules, region.no_decay, f"{PLAN_BLOCK}.regions[{number}].no_decay"
            )
    values: list[float | None] = []
    for i, p in enumerate(placed):
        own = block.weight_decay if p.choice.weight_decay is None else p.choice.weight_decay
        if p.region is not None and p.region.weight_decay is not None:
            own = p.region.weight_decay
        # A region's list takes the place of the block's, an empty one too.
        values.append(0.0 if i in exempt.get(id(p.region), outer) else own)
    return values


def _exempt(placed: list[Placed], rules: Rules, no_decay: tuple[str, ...], field: str) -> set[int]:
    """Indices of the parameters that any rule of a no_decay list hits."""
    hits: set[int] = set()
    for rule in no_decay:
        if rule == "ndim<=1":
            hits.update(i for i, p in enumerate(placed) if len(p.info.shape) <= 1)
        elif rule == "norm":
            hits.update(i for i, p in enumerate(placed) if p.label.is_norm)
        else:
            hits.update(rules.matching(rule, field))
    return hits
