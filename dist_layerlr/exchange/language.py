"""Importers of axolotl's, LLaMA-Factory's and ms-swift's groups, and of torchtitan's patterns."""

from __future__ import annotations

import re
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.exchange.common import NO_DECAY, Draft, Settings, number, rate, refuse
from dist_layerlr.plan.names import canonical_name

_EMBEDDINGS = r"re:embed_tokens|lm_head|modules_to_save\.default\.weight$"
_LORA_EMBEDDING = r"re:\.lora_embedding_B(?:\.|$)"
_LORA_EMBEDDING_LR = 1e-6
"""What PEFT's LoRA+ gives to the B of an embedding."""


def from_axolotl(given: Settings) -> Draft:
    """``lr_groups``, ``embedding_lr`` or ``embedding_lr_scale``, ``loraplus_lr_ratio``.

    Embeddings come first there, then what has no weight decay, then the groups: a group that lists
    a norm or a bias does not reach it.
    """
    draft = Draft(learning_rate=rate(given, "learning_rate"))
    ratio = number(given, "loraplus_lr_ratio")
    if ratio and given.get("lr_groups"):
        raise ConfigError(
            "Cannot convert loraplus_lr_ratio together with lr_groups: axolotl takes one of them,"
            " and B factors would be scaled twice. Keep one."
        )
    if ratio:
        _lora_plus(given, draft)
        return draft
    decay = number(given, "weight_decay") or 0.0
    scale, absolute = number(given, "embedding_lr_scale"), number(given, "embedding_lr")
    # As axolotl decides: a scale goes before an absolute rate, and 0 counts as not given.
    embedding = draft.learning_rate * scale if scale else absolute or draft.learning_rate
    draft.block["weight_decay"] = decay
    draft.regions.append({"match": _EMBEDDINGS, "lr": embedding, "weight_decay": 0.0})
    spared = {"match": NO_DECAY, "lr": draft.learning_rate, "weight_decay": 0.0}
    draft.regions.append(spared)
    for place, group in enumerate(_groups(given.get("lr_groups") or ())):
        path = f"lr_groups[{place}]"
        modules = fields.strings(f"{path}.modules", group.get("modules"))
        if not modules:
            # An expression of no alternatives would match every name.
            raise fields.invalid(f"{path}.modules", [], "a list of at least one part of a name")
        # A module is any part of a name there, PEFT's prefix included.
        found = "|".join(re.escape(canonical_name(module)) for module in modules)
        draft.regions.append({"match": f"re:{found}", "lr": rate(group, "lr", place=path)})
    return draft


def _groups(given: Any) -> list[Settings]:
    if not isinstance(given, (list, tuple)):
        raise fields.invalid("lr_groups", given, "a list of groups, each with modules and lr")
    return [fields.mapping(f"lr_groups[{i}]", group) for i, group in enumerate(given)]


def _lora_plus(given: Settings, draft: Draft) -> None:
    ratio = rate(given, "loraplus_lr_ratio")
    draft.block["lora_plus_ratio"] = ratio
    embedding = rate(given, "loraplus_lr_embedding", _LORA_EMBEDDING_LR)
    # The ratio acts in a region as well, and that rate is meant as it is.
    draft.regions.append({"match": _LORA_EMBEDDING, "lr": embedding / ratio})
    decay = number(given, "weight_decay")
    if decay:
        draft.block.update({"weight_decay": decay, "no_decay": [NO_DECAY]})
    draft.notes.append(
        "PEFT's rule also gives 1-D parameters the rate of lora_B, and under FSDP1 every lora_A;"
        " here lora_B alone has it"
    )


def from_llamafactory(given: Settings) -> Draft:
    """``learning_rate`` and ``loraplus_lr_ratio``; optimizers with layers of their own refused."""
    refuse(
        given,
        {
            "use_galore": "GaLore projects gradients, and is no matter of rates; train with AdamW",
            "use_badam": "BAdam trains one block at a time; train with AdamW",
            "use_apollo": "APOLLO scales gradients by itself; train with AdamW",
        },
    )
    draft = Draft(learning_rate=rate(given, "learning_rate"))
    if number(given, "loraplus_lr_ratio"):
        _lora_plus(given, draft)
    elif number(given, "weight_decay"):
        draft.block.update({"weight_decay": number(given, "weight_decay"), "no_decay": [NO_DECAY]})
    return draft


def from_swift(given: Settings) -> Draft:
    """``vit_lr`` and ``aligner_lr``; the model's prefixes as ``vision_tower`` and ``aligner``."""
    draft = Draft(learning_rate=rate(given, "learning_rate"))
    # The aligner first: it often lies within the vision tower, and ms-swift takes it out of that.
    for key, prefixes in (("aligner_lr", "aligner"), ("vit_lr", "vision_tower")):
        lr = number(given, key)
        if lr is None:
            continue
        names = fields.strings(prefixes, given.get(prefixes, ()))
        if not names:
            raise ConfigError(
                f"Missing {prefixes} in the settings: {key} holds for the modules that ms-swift's"
                f" model_arch names so. Add them, such as {prefixes}: [visual]."
            )
        found = "|".join(re.escape(name) for name in names)
        draft.regions.append({"match": rf"re:^(?:{found})(?:\.|$)", "lr": lr})
    if number(given, "weight_decay"):
        draft.block.update({"weight_decay": number(given, "weight_decay"), "no_decay": [NO_DECAY]})
    return draft


def from_torchtitan(given: Settings) -> Draft:
    """``optimizers``: patterns in order, each with lr and weight_decay; the first match wins."""
    listed = given.get("optimizers")
    if not isinstance(listed, (list, tuple)) or not listed:
        raise fields.invalid("optimizers", listed, "a list of {pattern, lr, weight_decay}")
    rows = [fields.mapping(f"optimizers[{i}]", row) for i, row in enumerate(listed)]
    for key in ("name", "type", "betas", "eps", "momentum"):
        values = {repr(row.get(key)) for row in rows}
        if len(values) > 1:
            raise ConfigError(
                f"Cannot convert optimizers with several {key} ({', '.join(sorted(values))}): a"
                " plan gives rates and weight decay alone. Use one."
            )
    # The last pattern is mostly `.*`, for everything that the others leave.
    last = f"optimizers[{len(rows) - 1}]"
    draft = Draft(learning_rate=rate(rows[-1], "lr", place=last))
    for i, row in enumerate(rows):
        path = f"optimizers[{i}]"
        region = {"match": f"re:{fields.text(f'{path}.pattern', row.get('pattern'))}"}
        decay = number(row, "weight_decay", place=path)
        more = {} if decay is None else {"weight_decay": decay}
        draft.regions.append({**region, "lr": rate(row, "lr", place=path), **more})
    draft.notes.append(
        "torchtitan refuses a parameter that no pattern takes; here it trains at the last"
        " pattern's rate"
    )
    return draft
