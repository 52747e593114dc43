"""Frozen weights that stay in their safetensors files: mapped, read page by page as they are
streamed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.units import Cut
from dist_layerlr.plan.names import base_name, canonical_name
from dist_layerlr.plan.read import checkpoint_files

_COMPARED = 256


def map_frozen(
    cuts: Iterable[Cut], files: str | Path | Iterable[str | Path] | None
) -> dict[str, Tensor]:
    """Map the frozen weights of the units. Nothing is read but headers and a sample.

    Args:
        cuts: the units.
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
    return {
        w.name: _mapped(w.name, w.param, where)
        for cut in cuts
        for w in cut.weights
        if not w.param.requires_grad
    }


def _index(files: str | Path | Iterable[str | Path]) -> dict[str, Path]:
    """{name in the checkpoint: file}."""
    from safetensors import SafetensorError, safe_open

    if isinstance(files, (str, Path)):
        paths = checkpoint_files(files) if Path(files).is_dir() else [Path(files)]
    else:
        paths = [Path(f) for f in files]
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(str(path), framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (SafetensorError, OSError) as error:
            raise OffloadError(f"Cannot map safetensors file {str(path)!r}: {error}.") from None
    return found


def _mapped(name: str, param: Tensor, where: dict[str, Path]) -> Tensor:
    from safetensors import safe_open

    base = base_name(canonical_name(name))
    file = where.get(base)
    if file is None:
        raise OffloadError(
            f"Parameter {name} is not in the given files as {base!r}. Stream it with host='memory'."
        )
    with safe_open(str(file), framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(base)
    mine, its = (tuple(param.shape), str(param.dtype)), (tuple(tensor.shape), str(tensor.dtype))
    for what, a, b in zip(("shape", "dtype"), mine, its, strict=True):
        if a != b:
            raise OffloadError(
                f"Parameter {name} has {what} {a}, its file {file.name} has {b}. "
                "Load the model as the file stores it, or stream it with host='memory'."
            )
    step = max(1, tensor.numel() // _COMPARED)
    ours, theirs = param.detach().reshape(-1)[::step].cpu(), tensor.view(-1)[::step]
    if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
        raise OffloadError(
            f"Parameter {name} differs from its file {file.name}: it was changed after loading. Use"
            " host='memory'."
        )
    return tensor
