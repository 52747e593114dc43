"""Datasets by ``data.kind``: one file each, one line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.data.base import LATENTS, Dataset
from launch.trainer.data.order import buckets_of

if TYPE_CHECKING:
    from launch.trainer.families.base import Family

_CLIP_AXES = 4
"""Of latents: channels, frames, height, width."""
# Imported only when asked for: each kind has its own dependencies.
KINDS: dict[str, str] = {
    "cached": "cached:CachedDataset",
    "classes": "classes:ClassFolders",
    "coco": "coco:CocoBoxes",
    "digits": "digits:MovingDigits",
    "text": "text:TextBlocks",
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


def fit_dataset(data: Dataset, family: Family, model_config: Mapping[str, Any]) -> None:
    """Give samples the axes that the model takes, and refuse those that it cannot take.

    Every sample's shapes are checked where the data set knows them without reading (``shapes``),
    and that those of a bucket fit into one batch; else the first sample alone.

    Raises:
        ModelSourceError: label, field, shape found and shape needed.
    """
    fit = getattr(family, "fit_data", None)
    if fit is not None:
        fit(model_config, data)
    shapes = getattr(data, "shapes", None)
    if shapes is None:
        family.check_sample(model_config, data[0], data.name(0))
        return
    layout = getattr(family, "layout", None)
    # A cache of images may be trained by a model of clips: an image is a clip of one frame.
    if layout is not None and len(layout(model_config)[LATENTS]) == _CLIP_AXES:
        data.give_frames()  # type: ignore[attr-defined]
    for members in buckets_of(data):
        _check_bucket(data, shapes, members, family, model_config)


def _check_bucket(
    data: Dataset,
    shapes: Callable[[int], Mapping[str, tuple[int, ...]]],
    members: Sequence[int],
    family: Family,
    model_config: Mapping[str, Any],
) -> None:
    """Check the samples of one bucket, each kind once: thousands may be alike."""
    kinds: dict[str, int] = {}
    for index in members:
        kinds.setdefault(str(sorted(shapes(index).items())), index)
    made = {}
    for index in kinds.values():
        # Meta tensors have a shape and no memory: nothing is read from the disk.
        made[index] = {k: torch.empty(v, device="meta") for k, v in shapes(index).items()}
        family.check_sample(model_config, made[index], data.name(index))
    first, *others = made
    for other in others:
        try:
            family.collate([made[first], made[other]])
        except Exception as error:
            names = [name for name in shapes(first) if shapes(first)[name] != shapes(other)[name]]
            raise ModelSourceError(
                f"{data.name(other)}: {names[0]} has shape {shapes(other)[names[0]]}, need"
                f" {shapes(first)[names[0]]} as {data.name(first)} has: this model takes prompts of"
                " one length; encode all samples with one --max-tokens, or by the model's own"
                " pipeline."
            ) from error


def _check_settings(
    kind: str, settings: Mapping[str, Any], allowed: Mapping[str, inspect.Parameter]
) -> None:
    fields.known_keys(f"data of kind {kind!r}", settings, allowed)
    for key, parameter in allowed.items():
        if parameter.default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(
                f"Missing key data.{key}. Kind {kind!r} needs it; add it to the data block."
            )
