"""Frozen weights that stay in their safetensors files.

They are mapped into memory: the system reads a page of the file when a fetch first touches it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dist_layerlr.errors import ModelSourceError, OffloadError
from dist_layerlr.files import read_safetensors_header
from dist_layerlr.offload.masters import sample
from dist_layerlr.offload.units import UnitSpec
from dist_layerlr.plan.names import base_name, canonical_name
from dist_layerlr.plan.read import checkpoint_files

_COMPARED = 256
"""Elements of a weight that are compared with its file. All of them would read the whole file."""


def map_frozen(
    specs: Iterable[UnitSpec], files: str | Path | Iterable[str | Path] | None
) -> dict[str, Tensor]:
    """Map the frozen weights of the units. Nothing is read but headers and a sample.

    Args:
        specs: the units.
        files: a checkpoint folder, or its safetensors files.

    Raises:
        OffloadError: no files, or a weight that they lack or hold otherwise (shape, dtype, values).
        ModelSourceError: a folder without safetensors.
    """
    if files is None:
        raise OffloadError(
            "Missing files: host='file' needs the checkpoint folder, stream(model, policy,"
            " files=FOLDER)."
        )
    where = _index(files)
    mapped: dict[str, Tensor] = {}
    for spec in specs:
        for weight in spec.weights:
            if not weight.param.requires_grad:
                mapped[weight.name] = _map(weight.name, weight.param, where)
    return mapped


def _index(files: str | Path | Iterable[str | Path]) -> dict[str, Path]:
    """{name in the checkpoint: file}."""
    if isinstance(files, (str, Path)):
        paths = checkpoint_files(files) if Path(files).is_dir() else [Path(files)]
    else:
        paths = [Path(f) for f in files]
    found: dict[str, Path] = {}
    for path in paths:
        try:
            tensors = read_safetensors_header(path).tensors
        except ModelSourceError as error:
            raise OffloadError(f"Cannot map frozen weights: {error}") from None
        found |= dict.fromkeys(tensors, path)
    return found


def _map(name: str, param: Tensor, where: dict[str, Path]) -> Tensor:
    """Map one weight, after a look whether the model still holds what the file does."""
    from safetensors import safe_open

    # In the files of a base model a weight that LoRA wrapped has the name it had before.
    base = base_name(canonical_name(name))
    file = where.get(base)
    if file is None:
        raise OffloadError(
            f"Parameter {name} is not in the given files as {base!r}. Stream it with host='memory'."
        )
    # The tensor keeps the mapping alive after the file is closed.
    with safe_open(str(file), framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(base)
    mine, its = (tuple(param.shape), str(param.dtype)), (tuple(tensor.shape), str(tensor.dtype))
    for what, a, b in zip(("shape", "dtype"), mine, its, strict=True):
        if a != b:
            raise OffloadError(
                f"Parameter {name} has {what} {a}, its file {file.name} has {b}. "
                "Load the model as the file stores it, or stream it with host='memory'."
            )
    ours, theirs = sample(param.detach(), _COMPARED).cpu(), sample(tensor, _COMPARED)
    # NaN differs from NaN, so both become 0; a model may well hold some.
    if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        raise OffloadError(
            f"Parameter {name} differs from its file {file.name}: it was changed after loading. Use"
            " host='memory'."
        )
    return tensor
