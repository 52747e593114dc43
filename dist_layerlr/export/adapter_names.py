"""Names of adapter tensors in files: PEFT's, pipelines', ComfyUI's, and kohya's flat ones. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.export.loaders import original_path
from dist_layerlr.plan.names import ParamPath, parse

PEFT_ROOT = "base_model.model"
KOHYA_ROOT = "lora_unet"
_KOHYA_LEAVES = {"lora_A": "lora_down", "lora_B": "lora_up"}
_WITHOUT_WEIGHT = frozenset({"lora_magnitude_vector"})
"""PEFT leaves the ``.weight`` of these out of its files."""


def adapter_of(name: str) -> str | None:
    """The adapter that a canonical name belongs to; None for a name of the base model.

    ``blocks.0.to_q.lora_A.style.weight`` and ``proj_out.modules_to_save.style.weight`` -> ``style``
    """
    segments = name.split(".")
    tail = _tail(name)
    return segments[tail + 1] if tail is not None and tail + 1 < len(segments) else None


def peft_name(name: str) -> str:
    """Name in ``adapter_model.safetensors``: the adapter's own name left out.

    ``blocks.0.to_q.lora_A.default.weight`` -> ``base_model.model.blocks.0.to_q.lora_A.weight``
    """
    segments, tail = name.split("."), _tail(name)
    assert tail is not None
    kept = segments[: tail + 1] + segments[tail + 2 :]
    if segments[tail] == "modules_to_save":
        del kept[tail]
    elif segments[tail] in _WITHOUT_WEIGHT and kept[-1] == "weight":
        del kept[-1]
    return ".".join((PEFT_ROOT, *kept))


def pipeline_name(name: str, component: str) -> str:
    """Name in diffusers' ``pytorch_lora_weights.safetensors``.

    ``blocks.0.to_q.lora_A.default.weight`` -> ``transformer.blocks.0.to_q.lora_A.weight``
    """
    return component + peft_name(name).removeprefix(PEFT_ROOT)


def comfyui_name(name: str, prefix: str, renames: Mapping[str, str]) -> str:
    """Name in ComfyUI's dotted form.

    ``blocks.0.attn1.to_q.lora_A.default.weight`` ->
    ``diffusion_model.blocks.0.self_attn.q.lora_A.weight``

    Args:
        name: canonical name.
        prefix: the first segment.
        renames: parts of a path, and what the original model calls them.

    Raises:
        ConfigError: a tensor for which the form has no name.
    """
    path = _plain(name, "comfyui")
    return ".".join((prefix, *original_path(path.owner, renames), path.leaf, "weight"))


def kohya_names(name: str, renames: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Names of a tensor, and of the alpha beside it, in a kohya file.

    ``blocks.0.to_q.lora_A.default.weight`` ->
    (``lora_unet_blocks_0_to_q.lora_down.weight``, ``lora_unet_blocks_0_to_q.alpha``)

    Raises:
        ConfigError: a tensor for which that convention has no name.
    """
    path = _plain(name, "kohya")
    root = "_".join((KOHYA_ROOT, *original_path(path.owner, renames or {})))
    return f"{root}.{_KOHYA_LEAVES[path.leaf]}.weight", f"{root}.alpha"


def alpha_of(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """The alpha of a pair with which ``alpha / rank`` is PEFT's scaling.

    Args:
        name: canonical name of its ``lora_A`` or ``lora_B``.
        rank: of the pair.
        config: content of ``adapter_config.json``.
    """
    path = ".".join(parse(name).owner)
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    # As PEFT's get_pattern_key: a pattern matches the end of a module's path, after a dot or alone.
    found = next(
        (patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", path)), config["lora_alpha"]
    )
    return float(found) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _plain(name: str, format: str) -> ParamPath:
    path = parse(name)
    if path.leaf not in _KOHYA_LEAVES or not name.endswith(".weight"):
        raise ConfigError(
            f"Cannot export {name} under a {format} name: only plain LoRA has them. Use the peft"
            " format, or pipeline."
        )
    return path


def _tail(name: str) -> int | None:
    """Index of the segment that opens the adapter's own part of a name."""
    segments = name.split(".")
    if "modules_to_save" in segments:
        return segments.index("modules_to_save")
    path = parse(name)
    if not path.is_adapter:
        return None
    return len(segments) - 1 - segments[::-1].index(path.leaf)
