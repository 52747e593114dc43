"""Adapters in files: PEFT's own, diffusers' pipelines', ComfyUI's and kohya's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.export import adapter_names
from dist_layerlr.export.contents import Export, TensorInfo, entries_of
from dist_layerlr.export.loaders import (
    COMFYUI,
    KOHYA,
    PEFT,
    PIPELINE,
    Loader,
    formats_of,
    loader_of,
)
from dist_layerlr.files import read_json
from dist_layerlr.plan.names import WRAPPER_SEGMENTS, parse
from dist_layerlr.sharders.model import unwrap
from dist_layerlr.weights.tensorfile import Entry

STEMS = {
    PEFT: "adapter_model",
    # The name that diffusers looks for in a folder.
    PIPELINE: "pytorch_lora_weights",
    COMFYUI: "comfyui_lora",
    KOHYA: "lora",
}
"""{format: its file without ``.safetensors``}."""
ADAPTER_CONFIG = "adapter_config.json"
_CLASS = "base_model_class"
"""Where PEFT keeps the name of the adapted class, under ``auto_mapping``."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter, whatever it becomes."""

    names: Sequence[str]
    """Canonical names of its tensors."""
    table: Mapping[str, TensorInfo]
    config: Mapping[str, Any]
    """Content of ``adapter_config.json``."""
    dtype: torch.dtype | None
    metadata: Mapping[str, str]

    @property
    def model_class(self) -> str | None:
        """Of the model that it adapts, where the config says so."""
        found: str | None = (self.config.get("auto_mapping") or {}).get(_CLASS)
        return found


def choose_adapter(adapter: Adapter, format: str, base: str | Path | None) -> Export:
    """Decide what of an adapter becomes what.

    Args:
        adapter: What there is.
        format: A key of ``STEMS``.
        base: Folder of the trained model; None: not known.

    Raises:
        ConfigError: the format has no names for this adapter, or files of it would load nothing.
    """
    model_class = adapter.model_class or _class_in(base)
    if base is not None:
        adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": str(base)})
    if format == PEFT:
        return _peft(adapter)
    loader = loader_of(model_class, format)
    if format == PIPELINE:
        return _pipeline(adapter, loader)
    # ComfyUI knows a UNet's modules by kohya's names.
    if format == COMFYUI and loader.comfyui:
        return _comfyui(adapter, loader)
    return _kohya(adapter, loader, STEMS[format])


def adapter_formats(model: nn.Module) -> tuple[str, ...]:
    """Formats of ``export_weights`` in which adapters of a live model are known to load."""
    return formats_of(class_of(unwrap(model)).__name__)


def described(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A live adapter's config as ``adapter_config.json`` has it, with the class of its model."""
    own = class_of(model)
    found = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    # PEFT itself writes it for whole PeftModels only.
    if not found.get("auto_mapping"):
        found["auto_mapping"] = {_CLASS: own.__name__, "parent_library": own.__module__}
    return found


def class_of(model: nn.Module) -> type:
    """The model's own class, whatever wraps it but for DDP and engines."""
    inner = next((m for name, m in model.named_children() if name in WRAPPER_SEGMENTS), None)
    if inner is not None:
        return class_of(inner)
    # fully_shard puts a class of torch's in front of it.
    classes = type(model).__mro__
    return next(one for one in classes if not one.__module__.startswith("torch.distributed."))


def _class_in(base: str | Path | None) -> str | None:
    path = None if base is None else Path(base) / "config.json"
    if path is None or not path.is_file():
        return None
    found: str | None = read_json(path).get("_class_name")
    return found


def _peft(adapter: Adapter) -> Export:
    names = {adapter_names.peft_name(name): name for name in adapter.names}
    return Export(
        entries=entries_of(names, adapter.table, adapter.dtype),
        names=names,
        stem=STEMS[PEFT],
        metadata=_with_config(adapter, adapter_names.PEFT_ROOT),
        texts={ADAPTER_CONFIG: json.dumps(adapter.config, indent=2) + "\n"},
    )


def _pipeline(adapter: Adapter, loader: Loader) -> Export:
    assert loader.component is not None
    names = {}
    for name in adapter.names:
        if "modules_to_save" in name.split("."):
            raise ConfigError(
                f"Cannot export {name} for a pipeline: load_lora_weights takes no whole modules."
                " Use the peft format."
            )
        names[adapter_names.pipeline_name(name, loader.component)] = name
    return Export(
        entries=entries_of(names, adapter.table, adapter.dtype),
        names=names,
        stem=STEMS[PIPELINE],
        metadata=_with_config(adapter, loader.component),
    )


def _with_config(adapter: Adapter, prefix: str) -> dict[str, str]:
    # diffusers takes rank and alpha from the header, under the prefix that it is told to strip.
    # Without them alpha becomes the rank, and nothing says so.
    packed = {f"{prefix}.{key}": value for key, value in adapter.config.items()}
    return {**adapter.metadata, "lora_adapter_metadata": json.dumps(packed)}


def _comfyui(adapter: Adapter, loader: Loader) -> Export:
    """Dotted names, the scale multiplied into ``lora_B``.

    ComfyUI takes a missing alpha for the rank, and so does diffusers without a header that says
    more: one file is then read alike by both.
    """
    assert loader.comfyui is not None
    names: dict[str, str] = {}
    factors: dict[str, float] = {}
    for name in adapter.names:
        written = adapter_names.comfyui_name(name, loader.comfyui, loader.original)
        names[written] = name
        if parse(name).is_lora_b:
            # Of this pair: PEFT may give modules ranks of their own.
            rank = adapter.table[name].shape[1]
            factors[written] = adapter_names.alpha_of(name, rank, adapter.config) / rank
    return Export(
        entries=entries_of(names, adapter.table, adapter.dtype),
        names=names,
        factors=factors,
        stem=STEMS[COMFYUI],
        metadata=adapter.metadata,
    )


def _kohya(adapter: Adapter, loader: Loader, stem: str) -> Export:
    """Flat names, the scale in a tensor ``alpha`` beside each pair."""
    names: dict[str, str] = {}
    alphas: dict[str, float] = {}
    for name in adapter.names:
        weight, alpha = adapter_names.kohya_names(name, loader.original)
        names[weight] = name
        # One alpha for each pair.
        if not parse(name).is_lora_b:
            rank = adapter.table[name].shape[0]
            alphas[alpha] = adapter_names.alpha_of(name, rank, adapter.config)
    weights = entries_of(names, adapter.table, adapter.dtype)
    scalar = adapter.dtype or torch.float32
    scalars = tuple(Entry(name=name, shape=(), dtype=scalar) for name in alphas)
    return Export(
        entries=weights + scalars,
        names=names,
        constants=alphas,
        stem=stem,
        metadata=adapter.metadata,
    )
