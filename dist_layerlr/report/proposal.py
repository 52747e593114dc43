"""From what moved far more or less than the rest to a config: proposed, never applied."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json
from dist_layerlr.plan.components import known_components
from dist_layerlr.plan.config import PLAN_BLOCK, load_config
from dist_layerlr.report.advise import FAR, LESS, MORE, OUTSIDE, ROWS, Evidence, Pool

RESOLVED = "resolved_config.json"
MOST = 4.0
"""How much one piece of advice changes a rate at most: what is far off is asked about again."""
UNPROVEN = (
    "Measured on two small models, rates set by this advice ended no better than one tuned flat"
    " rate (docs/evidence.md). Compare both before you trust it."
)
_DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What could be changed."""

    steer: Mapping[str, Any] | None
    """As ``steer.json`` and ``steered`` take it; None: nothing to change."""
    config: Mapping[str, Any] | None
    """``learning_rate`` and ``per_layer_lr`` of the run with the changes in them."""
    note: str
    """Why there is no config, where there is none."""


def propose(evidence: Evidence, folder: Path) -> Proposal:
    """What the evidence would have changed in the config of its run."""
    chosen = [pool for pool in evidence.pools if pool.change] if evidence.enough else []
    if not chosen:
        return Proposal(steer=None, config=None, note="")
    whole, parts = _folded(chosen, evidence)
    scale = [{"component": name, "by": by} for name, by in whole.items()]
    placed = [(pool, _pattern(pool, evidence.stacks), factor) for pool, factor in parts]
    for pool, pattern, factor in placed:
        scale.append({"component": pool.component, "match": pattern, "by": factor})
    config, note = None, ""
    try:
        config = _changed(read_json(folder / RESOLVED), whole, placed, evidence.components)
    except ConfigError as error:
        note = f"no config is proposed: {error}"
    return Proposal(steer={"scale": scale}, config=config, note=note)


def times(pool: Pool) -> float:
    """What the rate of a pool would be multiplied by: towards the rest, two digits."""
    return float(f"{min(max(1 / pool.moves.times, 1 / MOST), MOST):.2g}")


def _folded(
    chosen: Sequence[Pool], evidence: Evidence
) -> tuple[dict[str, float], list[tuple[Pool, float]]]:
    """Components that change as a whole, and parts of others."""
    whole: dict[str, float] = {}
    parts: list[tuple[Pool, float]] = []
    for component in dict.fromkeys(pool.component for pool in chosen):
        mine = [pool for pool in chosen if pool.component == component]
        there = [pool for pool in evidence.pools if pool.component == component]
        factors = [times(pool) for pool in mine]
        alike = all(factor < 1 for factor in factors) or all(factor > 1 for factor in factors)
        if len(mine) == len(there) and alike:
            # The least of what its parts ask for, so that none of them goes too far.
            whole[component] = max(factors) if factors[0] < 1 else min(factors)
        else:
            parts += zip(mine, factors, strict=True)
    return whole, parts


def _pattern(pool: Pool, stacks: Sequence[str]) -> str:
    """A pattern of the names of a pool's blocks, whatever component they are of."""
    # An adapter's names have a prefix, hence a stack may begin behind a dot.
    if pool.third == OUTSIDE:
        return rf"re:^(?!(.*\.)?({'|'.join(map(re.escape, stacks))})\.\d+\.)"
    found: list[str] = []
    for stack, blocks in pool.blocks.items():
        found.append(rf"{re.escape(stack)}\.({'|'.join(map(str, blocks))})")
    return rf"re:(^|\.)({'|'.join(found)})\."


def _changed(
    raw: Mapping[str, Any],
    whole: Mapping[str, float],
    parts: Iterable[tuple[Pool, str, float]],
    components: Iterable[str],
) -> dict[str, Any]:
    """The run's own settings of rates, with the changes in them.

    Raises:
        ConfigError: they cannot be said in it.
    """
    config = load_config({k: raw[k] for k in ("learning_rate", PLAN_BLOCK) if k in raw})
    settings = config.per_layer_lr
    if settings.regions:
        raise ConfigError(
            "the config has regions, whose rates are their own. Scale parts by steer.json, or edit"
            " the regions."
        )
    rates = {_DEFAULT: settings.default_lr, **settings.component_lr}
    for component in components:
        # A component that is not listed has the default rate, which may be about to change.
        rates.setdefault(component, settings.default_lr)
    unknown = rates.keys() - known_components() - {_DEFAULT} - settings.component_lr.keys()
    for component in unknown:
        raise ConfigError(f"the config does not name the component {component!r}.")
    for component, factor in whole.items():
        rates[component] = _scaled(rates[component], factor)
    default, table = _parted(rates)
    block = {**(raw.get(PLAN_BLOCK) or {}), "component_lr": table, "default_lr": default}
    by_blocks: dict[str, dict[str, float]] = {}
    for pool, pattern, factor in parts:
        # What lies in the same blocks shares a region: of two that match, only the first applies.
        own = by_blocks.setdefault(pattern, dict(rates))
        own[pool.component] = _scaled(rates[pool.component], factor)
    regions: list[dict[str, Any]] = []
    for pattern, own in by_blocks.items():
        # In a region `lr` is what is left for a component that its table does not list.
        lr, inside = _parted(own)
        other = {} if lr == default else {"lr": lr}
        regions.append({"match": pattern, **other, "component_lr": inside})
    block |= {"regions": regions} if regions else {}
    given = {"learning_rate": raw["learning_rate"]} if "learning_rate" in raw else {}
    proposed = {**given, PLAN_BLOCK: block}
    # What is proposed must be what the reader takes.
    load_config(proposed)
    return proposed


def _scaled(lr: float, factor: float) -> float:
    return float(f"{lr * factor:.3g}")


def _parted(rates: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The default rate, and those of the components."""
    table = dict(rates)
    return table.pop(_DEFAULT), table


def to_dict(evidence: Evidence, proposal: Proposal) -> dict[str, Any]:
    """JSON-ready."""
    pools: list[dict[str, Any]] = []
    for pool in evidence.pools:
        row: dict[str, Any] = {"component": pool.component, "third": pool.third}
        row |= {"update_ratio": pool.ratio, "verdict": pool.verdict, "rows": pool.rows}
        for name, found in (("moves", pool.moves), ("gradient", pool.gradient)):
            row[name] = None
            if found is not None:
                row[name] = {"times": found.times, "low": found.low, "high": found.high}
        pools.append({**row, "blocks": {s: list(numbers) for s, numbers in pool.blocks.items()}})
    return {
        "enough_rows": evidence.enough,
        "rows": {"measured": evidence.measured, "used": len(evidence.steps)},
        "steps": list(evidence.steps),
        "pools": pools,
        "left_out": list(evidence.left_out),
        "steer": proposal.steer,
        "config": proposal.config,
        "note": proposal.note,
        "unproven": UNPROVEN,
    }


def to_text(evidence: Evidence, proposal: Proposal) -> str:
    """What a person reads."""
    steps = evidence.steps
    used = f"{len(steps)} of {evidence.measured} measured rows"
    if steps:
        used += f", steps {steps[0]} to {steps[-1]}"
    why = f" ({evidence.why_fewer})" if evidence.why_fewer else ""
    lines = [f"{used}{why}"]
    if len(steps) < ROWS:
        lines += [
            f"not enough rows: {len(steps)}, and {ROWS} are needed to say anything. Train on, or"
            " lower train.cells_every."
        ]
        return "\n".join(lines) + "\n"
    left_out = [f"not compared: {text}" for text in evidence.left_out]
    if not evidence.pools:
        return "\n".join([*lines, *left_out, "no two parts could be compared"]) + "\n"
    lines += ["", *_table(evidence.pools), "", *left_out]
    if proposal.steer is None:
        lines += _nothing(evidence.pools)
    else:
        lines += _proposed(evidence, proposal)
    return "\n".join([*lines, UNPROVEN]) + "\n"


def _table(pools: Sequence[Pool]) -> list[str]:
    width = max([len("component"), *(len(pool.component) for pool in pools)])
    head = f"{'component':<{width}}  {'depth':<14}  {'update/weight':>13}  {'times the rest':<22}"
    lines = [f"{head}  {'gradient':>8}"]
    for pool in pools:
        moves = pool.moves
        span = f"{moves.times:.3g} ({moves.low:.3g} to {moves.high:.3g})"
        gradient = f"{pool.gradient.times:.3g}" if pool.gradient is not None else "0"
        text = f"{pool.component:<{width}}  {pool.third:<14}  {pool.ratio:>13.3g}  {span:<22}"
        mark = "" if pool.verdict not in (MORE, LESS) else f"moves {pool.verdict}"
        mark = "unsure" if pool.verdict not in (MORE, LESS, "alike") else mark
        lines.append(f"{text}  {gradient:>8}  {mark}".rstrip())
    return lines


def _nothing(pools: Sequence[Pool]) -> list[str]:
    lines = [f"nothing to change: no part surely moves {FAR:g} times more or less than the rest"]
    far = [pool for pool in pools if pool.verdict == LESS]
    if far:
        lines = [
            "nothing to change: where a part moves far less, its gradients are as small or smaller,"
            " and a higher rate would not bring it more to learn"
        ]
    return lines


def _proposed(evidence: Evidence, proposal: Proposal) -> list[str]:
    lines = ["proposed, and not applied:"]
    for pool in evidence.pools:
        if pool.change:
            lines.append(f"  {pool.component}, {pool.third}: rate x {times(pool):g}")
    if proposal.config is not None:
        lines += ["", "the same as a config, for a new run:", _json(proposal.config)]
    else:
        lines += ["", proposal.note]
    lines += ["", "the same as steer.json, for this one while it runs:", _json(proposal.steer), ""]
    rows = len(evidence.steps)
    return [
        *lines,
        f"How sure: a span is two standard errors of the median of {rows} rows to both sides; what",
        f"lies {FAR:g} times off with all of its span is proposed, a factor of {MOST:g} at most.",
        "Train, and ask again.",
    ]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)
