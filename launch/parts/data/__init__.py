"""Datasets by ``data.kind``: one file each, one line here."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from dist_layerlr.errors import ConfigError

from .base import Dataset

# Imported only when asked for: each kind has its own dependencies.
KINDS: dict[str, str] = {
    "cached": "cached:CachedDataset",
    "digits": "digits:MovingDigits",
}


def open_dataset(options: Mapping[str, Any]) -> Dataset:
    """Open the dataset of a config's ``data`` block: ``kind`` and that kind's own fields.

    Raises:
        ConfigError: unknown kind or field (names the nearest), missing field, or a value out of range.
    """
    kind = options.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"Invalid data.kind={kind!r}. Must be one of {sorted(KINDS)}.{_nearest(kind, KINDS)}")
    module, name = KINDS[kind].split(":")
    dataset_class = getattr(import_module(f".{module}", __name__), name)
    fields = {key: value for key, value in options.items() if key != "kind"}
    _check_fields(kind, fields, inspect.signature(dataset_class).parameters)
    dataset: Dataset = dataset_class(**fields)
    return dataset


def _check_fields(kind: str, fields: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter]) -> None:
    for key in fields:
        if key not in allowed:
            near = _nearest(key, allowed)
            raise ConfigError(f"Unknown key data.{key} for kind {kind!r}. Must be one of {sorted(allowed)}.{near}")
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in fields:
            raise ConfigError(f"Missing key data.{key}. Kind {kind!r} needs it; add it to the data block.")


def _nearest(key: object, allowed: Iterable[str]) -> str:
    near = get_close_matches(str(key), list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
