"""The keys around ``per_layer_lr`` in a training config, for programs that read no more of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.config import PLAN_BLOCK, Config

TRAINER_KEYS = (
    "model_path",
    "training_method",
    "data",
    "objective",
    "adapter",
    "optimizer",
    "schedule",
    "train",
    "samples",
    "validation",
    "ema",
    "memory",
)
"""Keys of ``launch/train.py``'s own, beside those that a plan is made from."""
REQUIRED_KEYS = ("model_type", "model_path", "data", "train")
"""A config with all of these is one for ``launch/train.py``, which knows every key."""
MODEL_TYPES = (
    "chroma_1",
    "flux_2_dev",
    "flux_2_klein_4b",
    "flux_2_klein_9b",
    "hunyuan_video",
    "llm",
    "ltx2",
    "pixart",
    "qwen",
    "rfdetr",
    "sana",
    "sd15",
    "sd35",
    "sdxl",
    "vit",
    "wan",
    "wan22",
    "zimage",
)
"""Families with a config in ``launch/configs``. Any other name is a model of the user's own."""


SCHEMA_FILE = Path(__file__).with_name("config.schema.json")
"""JSON Schema of a whole config, written by ``docs/config_schema.py`` from the declared fields."""


@cache
def config_schema() -> Mapping[str, Any]:
    """The JSON Schema of a whole config."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def check_training_config(raw: Mapping[str, Any]) -> None:
    """Refuse misspelt keys and families in a config that may hold more than a plan needs.

    Keys of another trainer's are left alone, unless they are almost one of ours.

    Raises:
        ConfigError: names the key or value, and what was meant.
    """
    known = (*fields.settings(Config), PLAN_BLOCK, *TRAINER_KEYS)
    if raw.keys() >= set(REQUIRED_KEYS):
        fields.known_keys("config", raw, known)
        _check_blocks(raw)
    for key in raw:
        # As near as in ``fields.near_misses``, but beside the right key too: one block of two that
        # look alike would be read by nobody.
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close and key not in known:
            raise ConfigError(f"Unknown key {key!r} in config. Did you mean {close[0]!r}?")
    family = raw.get("model_type")
    if isinstance(family, str) and family not in MODEL_TYPES:
        hint = fields.suggestion(family, MODEL_TYPES)
        if hint:
            allowed = f"one of {', '.join(MODEL_TYPES)}, or a name unlike these"
            raise fields.invalid("model_type", family, allowed, hint)


def _check_blocks(raw: Mapping[str, Any]) -> None:
    """Refuse unknown keys in the trainer's blocks; their declarations are the trainer's own."""
    for block, schema in config_schema()["properties"].items():
        if block == PLAN_BLOCK or schema.get("additionalProperties", True) is not False:
            continue
        given = fields.mapping(block, raw.get(block, {}))
        fields.known_keys(block, given, schema["properties"])
        for inner, below in schema["properties"].items():
            if inner in given and "properties" in below:
                path = f"{block}.{inner}"
                fields.known_keys(path, fields.mapping(path, given[inner]), below["properties"])
