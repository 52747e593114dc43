"""Checks of a sample's shapes that families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.files import read_json
from launch.trainer.data.base import Sample

Layout = Sequence[int | str]
"""The axes of a tensor: a number is the only size allowed, a letter stands for any size >= 1."""


def check_shape(sample: Sample, name: str, layout: Layout, label: str, step: str) -> None:
    """Refuse a field that is missing, has other axes than ``layout``, or another size along one.

    Args:
        sample: One item of the dataset.
        name: The field.
        layout: Its axes.
        label: File or sample name for the message.
        step: What the user should do.

    Raises:
        ModelSourceError: label, field, shape found and shape needed.
    """
    found = shape_of(sample, name, len(layout), spelled(layout), label)
    for size, wanted in zip(found, layout, strict=True):
        if size < 1 or (isinstance(wanted, int) and size != wanted):
            letters = [axis for axis in layout if isinstance(axis, str)]
            least = f" with {', '.join(letters)} >= 1" if letters else ""
            raise misfit(label, name, found, spelled(layout) + least, step)


def shape_of(sample: Sample, name: str, ndim: int, layout: str, label: str) -> tuple[int, ...]:
    """Return the shape of ``sample[name]``, which must have ``ndim`` dimensions.

    Raises:
        ModelSourceError: it is missing, or has another number of dimensions.
    """
    if name not in sample:
        raise ModelSourceError(
            f"{label}: {name} is missing. Needed: a tensor {layout}; found {sorted(sample)}."
        )
    shape = tuple(sample[name].shape)
    if len(shape) != ndim:
        raise misfit(label, name, shape, layout, "store samples without a batch dimension")
    return shape


def misfit(
    label: str, name: str, found: tuple[int, ...], needed: str, step: str
) -> ModelSourceError:
    """Word the error for a tensor of another shape than the model needs."""
    return ModelSourceError(
        f"{label}: {name} has shape {found}. This model needs {needed}; {step}."
    )


def refuse_key(model_config: Mapping[str, Any], key: str, allowed: object, what: str) -> None:
    """Refuse a checkpoint whose ``config.json`` has another value under ``key``.

    Args:
        model_config: Content of ``config.json``. A missing key passes.
        key: Its key.
        allowed: The value of the variant that is trained here.
        what: The variant that the other value stands for, and what to train instead.

    Raises:
        ModelSourceError: names the key, both values and ``what``.
    """
    found = model_config.get(key, allowed)
    if found != allowed:
        raise ModelSourceError(
            f"config.json of model_path has {key}={found!r}, and {allowed!r} is trained here:"
            f" {what}."
        )


def refuse_pipeline(model_folder: Path, key: str, allowed: Sequence[object], what: str) -> None:
    """Refuse a network whose pipeline's ``model_index.json`` has another value under ``key``.

    For variants whose networks have the same ``config.json``.

    Args:
        model_folder: Of the network. One that lies in no pipeline passes.
        key: A key of ``model_index.json``. A missing one passes.
        allowed: The values of what is trained here.
        what: The variant that another value stands for, and what to train instead.

    Raises:
        ModelSourceError: names the file, the key, its value, those allowed and ``what``.
    """
    path = model_folder.parent / "model_index.json"
    if not path.is_file():
        return
    index = read_json(path)
    if key in index and index[key] not in allowed:
        values = " or ".join(repr(value) for value in allowed)
        raise ModelSourceError(
            f"{path} has {key}={index[key]!r}, and {values} is trained here: {what}."
        )


def spelled(layout: Layout) -> str:
    """Write the axes as messages show them: (16, H, W)."""
    inner = ", ".join(str(axis) for axis in layout)
    return f"({inner},)" if len(layout) == 1 else f"({inner})"
