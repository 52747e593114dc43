"""LoRA and DoRA adapters: where they go, and the values that they start with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_layerlr import fields
from dist_layerlr.plan import Location, ParamPath, StackMap, canonical_name, parse
from dist_layerlr.weights import FileTensor
from launch.trainer.adapter_options import DORA, AdapterOptions
from launch.trainer.seeds import mix_seed

ADAPTER = "default"
"""PEFT's own name for a single adapter."""
_HEAD_STD = 0.02
"""Of a new head: what timm and transformers begin classifiers with."""
_MAGNITUDE = "lora_magnitude_vector"
Targets = tuple[str, ...] | str
"""Endings of module names, or one regular expression that matches whole names."""


def inject(model: nn.Module, adapter: AdapterOptions, family_targets: Targets) -> None:
    """Put an adapter into a model on the meta device, and freeze all but it.

    Raises:
        ConfigError: targets that match no module, or blocks without any.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    # PEFT takes a string for a regular expression and a list for endings.
    targets: Any = adapter.target_modules or family_targets
    targets = list(targets) if isinstance(targets, tuple) else targets
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=targets,
        use_dora=adapter.kind == DORA,
        use_rslora=adapter.rslora,
        lora_dropout=adapter.dropout,
    )
    if adapter.blocks is not None:
        config.target_modules = _in_blocks(model, config, adapter.blocks)
    try:
        # Not model.add_adapter, which some classes of diffusers lack.
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError:
        # Its text is the whole module, printed.
        allowed = f"name endings of linear or convolution layers of {type(model).__name__}"
        example = family_targets if isinstance(family_targets, str) else family_targets[0]
        hint = f" Such as {example!r}; see model.named_modules()."
        raise fields.invalid("adapter.target_modules", targets, allowed, hint) from None


def _in_blocks(model: nn.Module, config: Any, blocks: Sequence[int]) -> set[str]:
    """Names of the modules that PEFT would adapt, of these blocks alone.

    A number is that of the plan: within its stack, over all stages of a UNet. Side branches, such
    as refiners, have numbers of their own and are left out.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    stacks = StackMap(parse(canonical_name(name)) for name, _ in model.named_parameters())
    held: dict[int, set[str]] = {block: set() for block in blocks}
    sizes: dict[str, int] = {}
    for name, _ in model.named_modules():
        place = _place(stacks, name)
        if place is None or place.auxiliary:
            continue
        sizes[place.panel] = place.blocks
        if place.block in held and check_target_module_exists(config, name):
            held[place.block].add(name)
    empty = [block for block, names in held.items() if not names]
    if empty:
        there = "; ".join(f"{panel}: 0 to {size - 1}" for panel, size in sizes.items())
        raise fields.invalid(
            "adapter.blocks",
            list(blocks),
            "numbers of blocks that hold target modules",
            f" {empty} hold none. Stacks and their blocks: {there or 'none'}.",
        )
    return set().union(*held.values())


def _place(stacks: StackMap, module: str) -> Location | None:
    return stacks.locate(ParamPath(owner=tuple(module.split(".")), leaf="weight"))


def fresh_adapter(
    stored: Callable[[str], FileTensor | None],
    seed: int,
    half: torch.dtype | None,
    anew: Mapping[str, float] | None = None,
) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Return what makes the start of each tensor that no file holds, the same on every rank.

    It is PEFT's default: A kaiming uniform with a = sqrt(5), B zero, and DoRA's magnitudes the
    norms of the base weight's rows, so that the first output is that of the base model. A new
    head's weights are normal with a deviation of 0.02.

    Args:
        stored: Name of a base weight -> where its file has it.
        seed: Of the run.
        half: The dtype that base weights with 16 bits in their files are held in; None: fp32.
        anew: Weights of the base that no file holds, and the value of their vectors.
    """

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        path = parse(canonical_name(name))
        if path.leaf == _MAGNITUDE:
            weight = ".".join((*path.owner, "weight"))
            found = stored(weight)
            assert found is not None, f"check_pretrained missed {weight}"
            return _row_norms(found, half).reshape(shape)
        # Drawn by name and not in order, so that every rank draws the same whole tensor and keeps
        # its shard of it, whatever the sharder.
        full = torch.zeros(shape)
        generator = torch.Generator().manual_seed(mix_seed(seed, *name.encode()))
        if not path.is_adapter:
            if len(shape) > 1:
                nn.init.normal_(full, std=_HEAD_STD, generator=generator)
            else:
                full.fill_((anew or {})[name])
        elif not path.is_lora_b:
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        return full

    return make


def _row_norms(stored: FileTensor, half: torch.dtype | None) -> Tensor:
    """Norm over all but the first dimension, of the values that the model computes with."""
    with safe_open(str(Path(stored.file)), framework="pt") as file:
        weight: Tensor = file.get_tensor(stored.name)
    if half is not None and weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.to(half)
    norms: Tensor = weight.float().flatten(1).norm(dim=1)
    return norms
