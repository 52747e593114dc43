"""The model before it has memory, and the weights that go into it once it is sharded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr import fields
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan import canonical_name
from dist_layerlr.plan.names import base_name, parse
from dist_layerlr.weights import load_pretrained, pretrained_tensors
from launch.trainer.cli import blame
from launch.trainer.engines.offload import CAST_BY_AUTOCAST
from launch.trainer.families.base import Family
from launch.trainer.options import LORA, AdapterOptions, RunOptions
from launch.trainer.seeds import mix_seed

ADAPTER = "default"
"""PEFT's own name for a single adapter."""


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
            f"Cannot read {str(path)!r}: {error}. model_path must be a model folder in diffusers"
            " format."
        ) from None
    return dict(loaded)


def empty_model(family: Family, options: RunOptions) -> nn.Module:
    """Build the model on the meta device, adapters injected and ``requires_grad`` set.

    Buffers are real.

    Raises:
        ModelSourceError: no such folder, or one of another model class.
        ConfigError: adapter targets that match no module.
    """
    from accelerate import init_empty_weights

    config = read_model_config(options.model_path)
    family.check_config(config)
    path = Path(options.model_path) / "config.json"
    # Buffers stay real: they are computed at construction and stand in no checkpoint.
    with (
        blame(f"{path}: no model can be built from it", "restore the file"),
        init_empty_weights(include_buffers=False),
    ):
        model = family.build(config)
    if options.train.checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    if options.training_method == LORA:
        _inject_lora(model, options.adapter, family.lora_targets(config))
    for name in _without_gradient(family, model):
        model.get_parameter(name).requires_grad_(False)
    return model


def _without_gradient(family: Family, model: Any) -> list[str]:
    """Live names that the objective gives no gradient: parameters, and adapters on them."""
    still = set(family.without_gradient(model.config))
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


def _inject_lora(
    model: nn.Module, adapter: AdapterOptions, family_targets: tuple[str, ...] | str
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    targets = list(adapter.target_modules) or family_targets
    # PEFT takes a string for a regular expression and a list for endings.
    targets = list(targets) if isinstance(targets, tuple) else targets
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=targets)
    try:
        # Not model.add_adapter, which some classes of diffusers lack.
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError:
        # Its text is the whole module, printed.
        allowed = f"name endings of linear or convolution layers of {type(model).__name__}"
        example = family_targets if isinstance(family_targets, str) else family_targets[0]
        hint = f" Such as {example!r}; see model.named_modules()."
        raise fields.invalid("adapter.target_modules", targets, allowed, hint) from None


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

    An adapter's start derives from (seed, name).
    """
    load_pretrained(
        model,
        options.model_path,
        fresh=lambda name, shape: _fresh_adapter(name, shape, options.train.seed),
    )


def _fresh_adapter(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return PEFT's default start: A kaiming uniform with a = sqrt(5), B zero."""
    # Drawn by name and not in order, so that every rank draws the same whole tensor and keeps its
    # shard of it, whatever the sharder.
    full = torch.zeros(shape)
    if not parse(canonical_name(name)).is_lora_b:
        generator = torch.Generator().manual_seed(mix_seed(seed, *name.encode()))
        nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
    return full
