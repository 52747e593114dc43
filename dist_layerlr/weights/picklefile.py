"""Where a ``.pth`` of ``torch.save`` keeps its tensors: names and places, and no values.

torch 2 writes a zip whose entries are not compressed, so a tensor's bytes lie in one piece of the
file and can be read like those of a safetensors file.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.weights.tensorfile import FileTensor

SUFFIXES = (".pth", ".pt")
_WEIGHTS = ("model", "state_dict")
"""Keys under which training programs keep the weights, beside settings and optimizer states."""


def pickled_tensors(path: Path) -> dict[str, FileTensor]:
    """Where a file keeps each of its tensors. Code in the pickle is refused, not run.

    Raises:
        ModelSourceError: no such file, one of another kind, or one without named tensors.
    """
    try:
        # Fake tensors have no memory; each remembers where in the file its storage begins. Settings
        # of older training programs are an argparse.Namespace, which holds data alone.
        with FakeTensorMode(), torch.serialization.safe_globals([argparse.Namespace]):
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged or foreign file may raise anything.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelSourceError(
            f"Cannot read {str(path)!r} as weights of torch.save ({reason}). Copy it again, or"
            " convert it to safetensors."
        ) from None
    for key in _WEIGHTS:
        # A plain state dict has neither key, since names of tensors hold a dot or stand for one.
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    named = loaded if isinstance(loaded, Mapping) else {}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelSourceError(f"File {str(path)!r} holds no named tensors. Give the weights.")
    return {name: _placed(path, name, tensor) for name, tensor in tensors.items()}


def _placed(path: Path, name: str, tensor: Tensor) -> FileTensor:
    # None in files of torch before 1.6, which are no zip: their bytes lie one behind the other.
    first = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if first is None or not tensor.is_contiguous():
        raise ModelSourceError(
            f"Tensor {name!r} of {str(path)!r} does not lie in one piece. Save the file again with"
            " torch.save of this torch, or convert it to safetensors."
        )
    return FileTensor(
        name=name,
        file=path,
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        offset=first + tensor.storage_offset() * tensor.element_size(),
    )
