"""The model before it has memory, and the weights that go into it once it is sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.plan import Plan, base_name, canonical_name
from dist_layerlr.ranks import alike
from dist_layerlr.weights import load_pretrained, pretrained_tensors
from launch.trainer.adapters import fresh_adapter, inject
from launch.trainer.cli import blame
from launch.trainer.engines.offload import CAST_BY_AUTOCAST
from launch.trainer.families import get_family
from launch.trainer.families.base import Family, HasFreshWeights, live_config
from launch.trainer.options import LORA, PUBLISHED_MODEL, RunOptions
from launch.trainer.published import published_config


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint's ``config.json``.

    Raises:
        ModelSourceError: missing, or not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        fields.mapping("content", loaded)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelSourceError(
            f"Cannot read {str(path)!r}: {error}. model_path must be a folder of weights with"
            " their config.json."
        ) from None
    return dict(loaded)


def model_config(options: RunOptions) -> dict[str, Any]:
    """Return the config of the model that is trained; of the published one without model_path.

    Raises:
        ModelSourceError: missing, or not a JSON object.
    """
    if options.model_path != PUBLISHED_MODEL:
        return read_model_config(options.model_path)
    return published_config(options.model_type)


def empty_model(family: Family, options: RunOptions) -> nn.Module:
    """Build the model on the meta device, adapters injected and ``requires_grad`` set.

    Buffers are real.

    Raises:
        ModelSourceError: no such folder, or one of another model class.
        ConfigError: adapter targets that match no module.
    """
    from accelerate import init_empty_weights

    config = model_config(options)
    family.check_config(config)
    path = Path(options.model_path) / "config.json"
    # Buffers stay real: they are computed at construction and stand in no checkpoint.
    with (
        blame(f"{path}: no model can be built from it", "restore the file"),
        init_empty_weights(include_buffers=False),
    ):
        model = family.build(config)
    # The context gives each name a tensor of its own, those of tied weights too.
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    if options.train.checkpointing:
        family.checkpoint_blocks(model)
    if options.training_method == LORA:
        inject(model, options.adapter, family.lora_targets(config))
    for name in _without_gradient(family, model):
        model.get_parameter(name).requires_grad_(False)
    return model


def _without_gradient(family: Family, model: Any) -> list[str]:
    """Live names that the objective gives no gradient: parameters, and adapters on them."""
    still = set(family.without_gradient(live_config(model)))
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if base_name(canonical_name(name)) in still]


def frozen_line(family: Family, model: nn.Module, options: RunOptions) -> str | None:
    """Say which parameters would train but for the objective, which gives them no gradient.

    None where there are none.
    """
    names = _without_gradient(family, model)
    if options.training_method == LORA:
        # The base is frozen anyway.
        names = [name for name in names if base_name(canonical_name(name)) != name]
    if not names:
        return None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"frozen, because the objective gives them no gradient: {names[0]}{more}"


def spare_from_decay(family: Family, model: Any, plan: Plan) -> Plan:
    """Give weight decay 0 to what the family names; see ``Family.without_decay``."""
    spared = set(family.without_decay(live_config(model))) & plan.entries.keys()
    entries = {
        name: replace(entry, weight_decay=0.0) if name in spared else entry
        for name, entry in plan.entries.items()
    }
    return replace(plan, entries=entries) if spared else plan


def spared_line(family: Family, model: Any, plan: Plan) -> str | None:
    """Say which parameters have no weight decay because of the family; None where none."""
    spared = [name for name in family.without_decay(live_config(model)) if name in plan.entries]
    if not spared:
        return None
    return f"no weight decay for {', '.join(spared)}, which the family exempts"


def hold_in_16_bits(model: nn.Module, options: RunOptions) -> None:
    """Keep the frozen layers beside a LoRA in bf16 where their files hold 16 bits. On a meta model.

    Bitwise the same under bf16 autocast, which rounds the weights of these layers before every use;
    other parameters, and those that train, stay fp32. float16 is rounded to bf16 now and not then:
    a forward that asks a layer for its dtype is told what autocast computes in.
    """
    if options.train.dtype != "bf16" or options.training_method != LORA:
        return
    stored = pretrained_tensors(model, options.model_path)
    for path, module in model.named_modules():
        if not isinstance(module, CAST_BY_AUTOCAST):
            continue
        for name, param in module.named_parameters(recurse=False):
            found = stored.get(base_name(canonical_name(f"{path}.{name}")))
            halves = found is not None and found.dtype in (torch.bfloat16, torch.float16)
            if halves and not param.requires_grad:
                param.data = param.data.to(torch.bfloat16)


def load_base(model: nn.Module, options: RunOptions) -> None:
    """Fill the sharded model with the weights of ``model_path`` and fresh adapters. Collective.

    An adapter's start derives from (seed, name), and from the base weight under it.
    """

    @cache
    def stored() -> Mapping[str, Any]:
        # Only for a DoRA, and read once.
        return pretrained_tensors(model, options.model_path)

    def find(name: str) -> Any:
        return stored().get(name)

    half = torch.bfloat16 if options.train.dtype == "bf16" else None
    anew = alike(lambda: fresh_weights(options))
    fresh = fresh_adapter(find, options.train.seed, half, anew)
    load_pretrained(model, options.model_path, fresh=fresh, anew=anew)


def fresh_weights(options: RunOptions) -> Mapping[str, float]:
    """Return the weights that begin anew; see ``HasFreshWeights``.

    Raises:
        ConfigError: an adapter is to be trained, beside which they would never move.
    """
    family = get_family(options.model_type, options.objective)
    if not isinstance(family, HasFreshWeights):
        return {}
    names = family.fresh_weights(model_config(options))
    if names and options.training_method == LORA:
        raise ConfigError(
            f"Invalid training_method={LORA!r}: {min(names)} begins anew, and an adapter would"
            " leave it as it begins. Set training_method='fine_tune'."
        )
    return names


def fresh_line(options: RunOptions) -> str | None:
    """Say which weights begin anew; None where none."""
    names = sorted(fresh_weights(options))
    return f"new, not read from model_path: {', '.join(names)}" if names else None
