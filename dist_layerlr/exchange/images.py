"""Importers of kohya's sd-scripts (block weights, network_reg_lrs) and of timm's layer decay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.exchange.common import Draft, Region, Settings, number, rate
from dist_layerlr.plan.kohya import PARTS, SD, SDXL, weights

_BLOCK_KEYS = tuple(f"{part}_lr_weight" for part in PARTS)
_ADAPTER = r"\.(?:lora|hada|lokr|oft|dora)_"
"""What follows a module's path in the name of its adapter."""


def from_kohya(given: Settings) -> Draft:
    """``unet_lr`` x weight of each block, or ``network_reg_lrs``, first match wins.

    sd-scripts' files keep them in ``network_args``, a list of KEY=VALUE; its GUI as keys.
    """
    told = {**given, **_arguments(given.get("network_args"))}
    lr = number(told, "unet_lr")
    draft = Draft(learning_rate=rate(told, "learning_rate") if lr is None else lr)
    ratio = number(told, "loraplus_unet_lr_ratio") or number(told, "loraplus_lr_ratio")
    if ratio is not None:
        draft.block["lora_plus_ratio"] = ratio
    # An empty field of the GUI counts as not given, as it does there.
    has_blocks = any(told.get(key) for key in _BLOCK_KEYS)
    if has_blocks and told.get("network_reg_lrs"):
        raise ConfigError(
            "Cannot convert block weights together with network_reg_lrs: each gives the rate of the"
            " same modules, which would be scaled twice. Keep one of them."
        )
    if has_blocks:
        draft.regions.extend(_block_regions(told, draft))
    elif told.get("network_reg_lrs"):
        draft.regions.extend(_named_regions(str(told["network_reg_lrs"])))
    # A number, or one for each text encoder.
    if told.get("text_encoder_lr"):
        draft.notes.append("text_encoder_lr is left out: text encoders are not trained here")
    return draft


def _arguments(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    found: dict[str, str] = {}
    for argument in fields.strings("network_args", given):
        key, sign, value = argument.partition("=")
        if not sign:
            raise fields.invalid("network_args", argument, "a list of KEY=VALUE")
        found[key.strip()] = value
    return found


def _block_regions(told: Mapping[str, Any], draft: Draft) -> list[Region]:
    slots = SDXL if told.get("sdxl") else SD
    patterns: dict[float, list[str]] = {}
    for part, values in weights(slots, told).items():
        for place, weight in enumerate(values):
            pattern = slots.pattern(part, place)
            if weight != 1.0 and pattern is not None:
                patterns.setdefault(weight, []).append(pattern)
    if 0.0 in patterns:
        draft.notes.append(
            "blocks of weight 0 get no adapter in sd-scripts; here they are held at lr 0. To leave"
            " them out, name the others in adapter.blocks"
        )
    # Slots of one weight are one region: most have modules, so that it matches something.
    return [
        {"match": f"re:{'|'.join(found)}", "lr_multiplier": weight}
        for weight, found in patterns.items()
    ]


def _named_regions(text: str) -> list[Region]:
    regions: list[Region] = []
    for pair in filter(None, (part.strip() for part in text.split(","))):
        pattern, sign, lr = pair.rpartition("=")
        if not sign:
            raise fields.invalid("network_reg_lrs", pair, "REGEX=LR pairs with commas between them")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"Invalid network_reg_lrs pattern {pattern!r}: {error}.") from None
        # The whole path of the adapted module must match there.
        match = rf"re:^(?:{pattern}){_ADAPTER}"
        regions.append({"match": match, "lr": rate({pattern: lr}, pattern)})
    return regions


def from_timm(given: Settings) -> Draft:
    """``lr``, ``layer_decay`` and its floor, ``weight_decay`` of timm's ``create_optimizer_v2``."""
    draft = Draft(learning_rate=rate(given, "lr"))
    if number(given, "layer_decay_no_opt_scale"):
        raise ConfigError(
            "Cannot convert layer_decay_no_opt_scale: it freezes layers, which the model must do."
            " Set requires_grad of those layers, and remove it."
        )
    layer_decay = number(given, "layer_decay")
    if layer_decay is not None:
        draft.block.update(
            {
                "depth_strategy": "layer_decay",
                "layer_decay": layer_decay,
                "convention": "timm",
            }
        )
        floor = number(given, "layer_decay_min_scale") or number(given, "min_scale")
        if floor:
            draft.block["min_depth_factor"] = floor
    decay = number(given, "weight_decay")
    if decay:
        names = list(fields.strings("no_weight_decay", given.get("no_weight_decay", ())))
        draft.block.update({"weight_decay": decay, "no_decay": ["ndim<=1", *names]})
        if not names:
            draft.notes.append(
                "timm also spares what model.no_weight_decay() names (pos_embed, cls_token ...):"
                " give those names as no_weight_decay"
            )
    draft.notes.append(
        "rates are absolute here: drive them with PlanSchedule or a torch scheduler, and do not"
        " keep lr_scale in the groups, which timm's scheduler would multiply a second time"
    )
    return draft
