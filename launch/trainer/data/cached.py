"""A data set of latents and prompt embeddings encoded beforehand, one safetensors file per sample.

Only headers are read when the data set is made, so a wrong file stops the run before any weight is
loaded. ``launch/cache_latents.py`` writes such folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS

CAPTION = "caption"  # metadata

_ALLOWED_DIMS = {LATENTS: (3, 4), PROMPT_EMBEDS: (2,)}
_AXES = {LATENTS: "(C, F, H, W) or (C, H, W)", PROMPT_EMBEDS: "(L, D)"}
_FLOATS = ("F16", "BF16", "F32", "F64")
_REWRITE = "write it again with `python launch/cache_latents.py --overwrite`"


@dataclass(frozen=True, kw_only=True)
class SampleHeader:
    """What the header of one sample file says; no tensor is read."""

    path: Path
    """The safetensors file."""
    shapes: Mapping[str, tuple[int, ...]]
    """``latents`` as (C, F, H, W) and ``prompt_embeds`` as (L, D)."""
    dtypes: Mapping[str, str]
    """Element types as safetensors spells them: F32, BF16, F16 or F64."""
    metadata: Mapping[str, str]
    """The file's own metadata, such as ``caption``; may be empty."""


def read_header(path: Path) -> SampleHeader:
    """Read and check the header of one sample file.

    Raises:
        ModelSourceError: the file is damaged, lacks a field, or a field has the wrong number of
            dims or type.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            for field in _ALLOWED_DIMS:
                if field not in keys:
                    raise ModelSourceError(
                        f"{path}: no field {field!r}; found {sorted(keys)}, need"
                        f" {list(_ALLOWED_DIMS)}; {_REWRITE}."
                    )
                view = file.get_slice(field)
                shapes[field], dtypes[field] = tuple(view.get_shape()), view.get_dtype()
            # A file without metadata answers None.
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    for field in _ALLOWED_DIMS:
        _check_field(path, field, shapes[field], dtypes[field])
    shapes[LATENTS] = _with_frames(shapes[LATENTS])
    return SampleHeader(path=path, shapes=shapes, dtypes=dtypes, metadata=metadata)


class CachedDataset:
    """Samples of a folder, in the sorted order of their relative paths; sub-folders are included.

    Example:
        ``CachedDataset("cache")[0]`` is ``{"latents": (C, F, H, W), "prompt_embeds": (L, D)}``,
        float32 on the CPU.
    """

    def __init__(self, folder: str) -> None:
        """Read every header and check that all samples agree.

        Args:
            folder: holds ``.safetensors`` files, each with ``latents`` (C, F, H, W) and
                ``prompt_embeds`` (L, D).

        Raises:
            ModelSourceError: the folder is missing or empty, a file is damaged or lacks a field, or
                shapes differ.
        """
        self.folder = Path(folder)
        self._headers = [read_header(path) for path in _sample_files(self.folder)]
        for header in self._headers[1:]:
            _check_same_shapes(self._headers[0], header)

    def __len__(self) -> int:
        return len(self._headers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Load sample ``index``, float32 on the CPU.

        It holds ``latents`` (C, F, H, W) and ``prompt_embeds`` (L, D).

        Raises:
            ModelSourceError: the file changed or went away since the data set was made, or holds
                NaN or infinity.
        """
        header = self._headers[index]
        # Opened for each read: a file kept open per sample would exceed the usual limit of 1,024.
        try:
            with safe_open(header.path, framework="pt") as file:
                sample = {
                    field: file.get_tensor(field).to(torch.float32) for field in _ALLOWED_DIMS
                }
        except (SafetensorError, OSError) as error:
            raise _damaged(header.path, error) from error
        for field, tensor in sample.items():
            _check_loaded(header, field, tensor)
        return {field: tensor.reshape(header.shapes[field]) for field, tensor in sample.items()}

    def name(self, index: int) -> str:
        """Caption of sample ``index``, or the file name where the file carries none."""
        header = self._headers[index]
        return header.metadata.get(CAPTION) or header.path.name

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of sample ``index`` as ``[index]`` returns them, from its header alone."""
        return dict(self._headers[index].shapes)


def _sample_files(folder: Path) -> list[Path]:
    """List the ``.safetensors`` files under a folder, sorted by relative path."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelSourceError(
            f"Invalid data folder {str(folder)!r}: it {what}; need a folder of .safetensors"
            " samples; make one with `python launch/cache_latents.py`."
        )
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    if not files:
        raise ModelSourceError(
            f"Invalid data folder {str(folder)!r}: found 0 .safetensors files, need at least 1; "
            "make them with `python launch/cache_latents.py`."
        )
    # The order must not depend on the file system: sample numbers decide noise and batches.
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _check_field(path: Path, field: str, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse a wrong number of dims, an empty axis, or a type that is not floating point."""
    if len(shape) not in _ALLOWED_DIMS[field]:
        raise ModelSourceError(
            f"{path}: {field} has shape {shape}, need {_AXES[field]}; {_REWRITE}."
        )
    if 0 in shape:
        raise ModelSourceError(
            f"{path}: {field} has shape {shape}, need every axis >= 1; {_REWRITE}."
        )
    if dtype not in _FLOATS:
        raise ModelSourceError(
            f"{path}: {field} has type {dtype}, need one of {', '.join(_FLOATS)}; {_REWRITE}."
        )


def _check_same_shapes(first: SampleHeader, other: SampleHeader) -> None:
    """Refuse a sample whose shapes are not those of the first one."""
    for field, shape in first.shapes.items():
        if other.shapes[field] != shape:
            raise ModelSourceError(
                f"{other.path}: {field} has shape {other.shapes[field]}, need {shape} as in"
                f" {first.path}; encode all samples with one --frames, --height, --width and"
                " --max-tokens."
            )


def _check_loaded(header: SampleHeader, field: str, tensor: Tensor) -> None:
    """Refuse a tensor that is not what its header said, or that would poison the weights."""
    found = tuple(tensor.shape)
    if (_with_frames(found) if field == LATENTS else found) != header.shapes[field]:
        raise ModelSourceError(
            f"{header.path}: {field} now has shape {found}, need {header.shapes[field]} as when the"
            " run began; do not rewrite samples during a run."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ModelSourceError(
            f"{header.path}: {field} holds NaN or infinity, need finite numbers; {_REWRITE}."
        )


def _with_frames(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give latents their frame axis: (C, H, W) -> (C, 1, H, W)."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def _damaged(path: Path, error: Exception) -> ModelSourceError:
    """Word the error for a file that safetensors cannot read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelSourceError(
        f"{path}: not a readable safetensors file ({reason}); need a whole file; {_REWRITE}."
    )
