"""A plan in the forms of others: torch's parameter groups, timm's, kohya's block weights. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.kohya import PARTS, SD, SDXL

if TYPE_CHECKING:
    from dist_layerlr.plan.entries import Plan, PlanEntry

Group = dict[str, Any]


def untimed(plan: Plan, form: str) -> None:
    """Refuse a plan with timings: others would train every name from the first step on.

    Raises:
        ConfigError: the plan has timings.
    """
    timed = next((e for e in plan.entries.values() if e.timing is not None), None)
    if timed is not None:
        raise ConfigError(
            f"{form} cannot say when a name trains, and {timed.name} trains {timed.timing}. Build"
            " the optimizer with attach(plan, model, make), or plan without timings."
        )


def param_groups(plan: Plan, params: Mapping[str, Any] | None) -> list[Group]:
    """See ``Plan.to_param_groups``."""
    untimed(plan, "A list of parameter groups")
    groups: list[Group] = []
    for spec in plan.groups:
        group: Group = {
            "params": _of(params, spec.names),
            "param_names": list(spec.names),
            "name": spec.name,
            "lr": spec.lr,
        }
        if spec.weight_decay is not None:
            group["weight_decay"] = spec.weight_decay
        groups.append(group)
    return groups


def timm_groups(plan: Plan, params: Mapping[str, Any] | None, base_lr: float | None) -> list[Group]:
    """See ``Plan.to_timm``."""
    base = max((spec.lr for spec in plan.groups), default=0.0) if base_lr is None else base_lr
    if base <= 0.0:
        raise ConfigError(
            f"Invalid base_lr={base:g}: must be a number > 0, which lr_scale multiplies."
        )
    groups = param_groups(plan, params)
    for group in groups:
        # The rate itself stays unscaled: timm's scheduler multiplies, once.
        group["lr_scale"] = group["lr"] / base
        group["lr"] = base
        # timm takes the parameters' names from elsewhere, and torch refuses some groups without.
        del group["name"]
    return groups


def _of(params: Mapping[str, Any] | None, names: tuple[str, ...]) -> list[Any]:
    if params is None:
        return list(names)
    missing = [name for name in names if name not in params]
    if missing:
        raise ConfigError(
            f"Invalid params: {missing[0]!r} and {len(missing) - 1} more planned names are not in"
            " it. Give {canonical name: tensor} of the model that was planned."
        )
    return [params[name] for name in names]


def kohya_settings(plan: Plan, *, sdxl: bool) -> dict[str, Any]:
    """See ``Plan.to_kohya``."""
    untimed(plan, "A config of kohya's")
    slots = SDXL if sdxl else SD
    lowered: dict[tuple[str, int], PlanEntry] = {}
    outside: PlanEntry | None = None
    for entry in plan.entries.values():
        if entry.weight_decay is not None:
            raise _inexpressible(f"{entry.name} has a weight decay of its own")
        place = slots.slot_of(entry.name)
        if place is None:
            outside = _same(outside, entry, "outside all blocks")
        else:
            lowered[place] = _same(lowered.get(place), entry, f"in {place[0]} slot {place[1]}")
    if not lowered:
        raise _inexpressible("no name lies in a block of a UNet")
    # What no slot scales has unet_lr itself; without it any base would do, and the highest keeps
    # all weights in [0, 1].
    base = outside or max(lowered.values(), key=lambda e: e.lr / e.lora_plus)
    rate = base.lr / base.lora_plus
    if rate <= 0.0:
        raise _inexpressible(f"{base.name}, by which others are measured, has lr 0")
    arguments = []
    for part in PARTS:
        ratios = []
        for number in range(slots.count(part)):
            held = lowered.get((part, number))
            ratios.append(1.0 if held is None else held.lr / held.lora_plus / rate)
        arguments.append(f"{part}_lr_weight={','.join(f'{ratio:.10g}' for ratio in ratios)}")
    ratio = plan.config.per_layer_lr.lora_plus_ratio
    if ratio != 1.0:
        arguments.append(f"loraplus_unet_lr_ratio={ratio:g}")
    return {"unet_lr": rate, "network_args": arguments}


def _same(known: PlanEntry | None, entry: PlanEntry, where: str) -> PlanEntry:
    if known is None:
        return entry
    # LoRA+ is a setting of its own there.
    first, second = known.lr / known.lora_plus, entry.lr / entry.lora_plus
    if not math.isclose(first, second, rel_tol=1e-9):
        raise _inexpressible(
            f"{known.name} (lr {first:g}) and {entry.name} (lr {second:g}) both lie {where}"
        )
    return known


def _inexpressible(why: str) -> ConfigError:
    return ConfigError(
        f"This plan cannot be said in kohya's block weights, one rate per slot: {why}. Plan without"
        " components (component_lr={}), or train with this project."
    )
