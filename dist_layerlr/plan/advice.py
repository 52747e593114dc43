"""What a user may not have meant: looked for once, in the finished plan, and said in words."""

from __future__ import annotations

from collections.abc import Mapping

from dist_layerlr.errors import UnmatchedParams
from dist_layerlr.plan.config import Config
from dist_layerlr.plan.entries import PlanEntry, total_numel
from dist_layerlr.plan.name_rules import DEFAULT, NORM

MATRIX_NORM_SHARE = 0.05
"""Share of elements above which norm-labelled matrices are worth a warning."""


def check_plan(entries: Mapping[str, PlanEntry], config: Config) -> tuple[str, ...]:
    """Apply ``unmatched`` and collect warnings.

    Raises:
        UnmatchedParams: under ``unmatched: error``, naming the first ten.
    """
    rows = list(entries.values())
    total = total_numel(rows) or 1
    found = [
        _unmatched(rows, total, config),
        _unlisted(rows, total, config),
        _matrix_norms(rows, total, config),
        *_unused(rows, config),
        *_idle_optimizers(rows, config),
        _loud_default(rows, config),
        _held_still(rows),
    ]
    return tuple(filter(None, found))


def _unmatched(rows: list[PlanEntry], total: int, config: Config) -> str:
    policy = config.per_layer_lr.unmatched
    missed = [e for e in rows if e.component == DEFAULT and _region_gives_no_lr(e, config)]
    if not missed or policy == "default":
        return ""
    share = f"{len(missed)} parameters ({total_numel(missed) / total:.1%} of the elements)"
    names = _names(missed[:10])
    if policy == "error":
        raise UnmatchedParams(
            f"No rule names {share} (unmatched='error'): {names}. Add a pattern or a region for"
            " them, list one of the fine components (modulation, embed, head, conv, fused), or set"
            " unmatched to 'warn' or 'default'."
        )
    default = f"default_lr={config.per_layer_lr.default_lr:g} (times depth in blocks)"
    write = f'"patterns": [{{"match": "{missed[0].name}", "component": "..."}}]'
    return (
        f"{share} match no component and take {default}: {_few(missed)}; to change it, write"
        f" {write} (* for a part of a name)"
    )


def _region_gives_no_lr(entry: PlanEntry, config: Config) -> bool:
    region = next((r for r in config.per_layer_lr.regions if r.match == entry.region), None)
    return region is None or region.lr is None


def _unlisted(rows: list[PlanEntry], total: int, config: Config) -> str:
    listed = set(config.per_layer_lr.component_lr) | {DEFAULT}
    # An empty component_lr is meant: one rate for all components.
    if len(listed) == 1:
        return ""
    # A region may list rates of its own.
    missed = [e for e in rows if e.component not in listed and e.region is None]
    if not missed:
        return ""
    found = sorted({e.component for e in missed})
    kinds = ", ".join(found)
    write = ", ".join(f'"{kind}": LR' for kind in found)
    return (
        f"component_lr does not list {kinds}: {len(missed)} parameters"
        f" ({total_numel(missed) / total:.1%} of the elements) take"
        f" default_lr={config.per_layer_lr.default_lr:g} (times depth in blocks); to change it, add"
        f" {write} to component_lr"
    )


def _matrix_norms(rows: list[PlanEntry], total: int, config: Config) -> str:
    matrices = [e for e in rows if e.component == NORM and len(e.shape) >= 2 and e.region is None]
    share = total_numel(matrices) / total
    if share <= MATRIX_NORM_SHARE:
        return ""
    return (
        f"{share:.1%} of the elements are matrices under a norm-named module ({_few(matrices)}) and"
        " train at the norm rate; list 'modulation' in component_lr to give them their own"
    )


def _unused(rows: list[PlanEntry], config: Config) -> list[str]:
    used = {e.component for e in rows}
    given = config.per_layer_lr.component_lr
    return [
        f"component_lr.{key} applies to no trainable parameter of this model"
        for key in given
        # Norms are in the default table, and frozen under LoRA: no mistake of the user's.
        if key not in used and key != NORM
    ]


def _idle_optimizers(rows: list[PlanEntry], config: Config) -> list[str]:
    used = {e.optimizer for e in rows}
    names = config.optimizers.names if config.optimizers is not None else ()
    return [
        f"optimizers.{name} takes no trainable parameter of this model, and training refuses that;"
        " remove it, or list components whose matrices it can take (see dist-layerlr explain)"
        for name in filter(lambda name: name not in used, names)
    ]


def _loud_default(rows: list[PlanEntry], config: Config) -> str:
    listed = [lr for lr in config.per_layer_lr.component_lr.values() if lr > 0]
    default = config.per_layer_lr.default_lr
    if not listed or default <= 5 * max(listed) or not any(e.base_lr == default for e in rows):
        return ""
    return (
        f"default_lr={default:g} is {default / max(listed):.0f} times the largest component_lr;"
        " give default_lr"
    )


def _held_still(rows: list[PlanEntry]) -> str:
    still = [e for e in rows if e.lr == 0.0]
    return (
        f"{len(still)} trainable parameters have lr 0 and are held still (frozen): {_few(still)}"
        if still
        else ""
    )


def _few(rows: list[PlanEntry]) -> str:
    return _names(rows[:3]) + (", ..." if len(rows) > 3 else "")


def _names(rows: list[PlanEntry]) -> str:
    return ", ".join(e.name for e in rows)
