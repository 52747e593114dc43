"""Datasets by ``data.kind``: one file each, one line here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from launch.trainer.data.base import Dataset

if TYPE_CHECKING:
    from launch.trainer.families.base import Family

# Imported only when asked for: each kind has its own dependencies.
KINDS: dict[str, str] = {
    "cached": "cached:CachedDataset",
    "digits": "digits:MovingDigits",
}


def open_dataset(options: Mapping[str, Any]) -> Dataset:
    """Open the dataset of a config's ``data`` block: ``kind`` and that kind's own fields.

    Raises:
        ConfigError: unknown kind or field (names the nearest), missing field, or a value out of
            range.
    """
    kind = fields.one_of(lambda: tuple(KINDS))("data.kind", options.get("kind"))
    module, name = KINDS[kind].split(":")
    # A kind's fields are the arguments of its class, so that each is declared once.
    dataset_class = getattr(import_module(f".{module}", __name__), name)
    settings = {key: value for key, value in options.items() if key != "kind"}
    _check_settings(kind, settings, inspect.signature(dataset_class).parameters)
    dataset: Dataset = dataset_class(**settings)
    return dataset


def check_dataset(data: Dataset, family: Family, model_config: Mapping[str, Any]) -> None:
    """Refuse a dataset that the model cannot take.

    Every sample's shapes are checked where the dataset knows them without reading (``shapes``),
    else those of the first sample.

    Raises:
        ModelSourceError: label, field, shape found and shape needed.
    """
    shapes = getattr(data, "shapes", None)
    if shapes is None:
        family.check_sample(model_config, data[0], data.name(0))
        return
    for i in range(len(data)):
        # Meta tensors have a shape and no memory: nothing is read from the disk.
        sample = {key: torch.empty(size, device="meta") for key, size in shapes(i).items()}
        family.check_sample(model_config, sample, data.name(i))


def _check_settings(
    kind: str, settings: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter]
) -> None:
    fields.known_keys(f"data of kind {kind!r}", settings, allowed)
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(
                f"Missing key data.{key}. Kind {kind!r} needs it; add it to the data block."
            )
