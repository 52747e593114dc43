"""The model families that can be trained: one file each, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from dist_layerlr import fields
from launch.trainer.families.base import Family, HasVariants

# Imported only when asked for: each family has its own dependencies.
FAMILIES: dict[str, str] = {
    "chroma_1": "chroma:Chroma",
    "flux_2_dev": "flux2:Flux2Dev",
    "flux_2_klein_4b": "flux2:Flux2Klein4B",
    "flux_2_klein_9b": "flux2:Flux2Klein9B",
    "hunyuan_video": "hunyuan_video:HunyuanVideo",
    "llm": "llm:LLM",
    "ltx2": "ltx2:LTX2",
    "pixart": "pixart:PixArt",
    "qwen": "qwen:Qwen",
    "rfdetr": "rfdetr:RFDETR",
    "sana": "sana:Sana",
    "sd15": "sd15:SD15",
    "sd35": "sd35:SD35",
    "sdxl": "sdxl:SDXL",
    "vit": "vit:ViT",
    "wan": "wan:Wan",
    "wan22": "wan22:Wan22",
    "zimage": "zimage:ZImage",
}
"""``model_type`` -> module and class."""


def get_family(model_type: str, settings: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a config's ``model_type``.

    Args:
        model_type: A key of ``FAMILIES``.
        settings: What the ``objective`` block gives, checked: a family may be another one then.

    Raises:
        ConfigError: no such family; names the allowed ones.
    """
    if model_type in FAMILIES:
        family = _made(model_type)
        return family.variant(settings or {}) if isinstance(family, HasVariants) else family
    hint = fields.suggestion(model_type, FAMILIES) or " Plans of other models: `dist-layerlr plan`."
    raise fields.invalid(
        "model_type", model_type, f"one of {', '.join(sorted(FAMILIES))} to be trained here", hint
    )


@cache
def _made(model_type: str) -> Family:
    module, name = FAMILIES[model_type].split(":")
    family: Family = getattr(import_module(f".{module}", __name__), name)()
    return family
