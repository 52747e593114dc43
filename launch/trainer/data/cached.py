"""A data set of latents and prompts encoded beforehand, one safetensors file per sample.

Only headers are read when the data set is made, so a wrong file stops the run before any weight is
loaded. ``launch/cache_latents.py`` writes such folders.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_layerlr import fields
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.files import read_safetensors_header
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS

CAPTION = "caption"  # metadata
EMPTY_PROMPT = "_empty_prompt.safetensors"
"""Reserved name: what an empty caption is encoded to. It is no sample."""

UNFINISHED = "_unfinished"
"""Stem of a file that is there while a process writes samples, and stays where one was cut off."""

_ALLOWED_DIMS = {LATENTS: (3, 4), PROMPT_EMBEDS: (2,)}
"""Of the fields that every family takes in the same form; the others are the family's to check."""
_AXES = {LATENTS: "(C, F, H, W) or (C, H, W)", PROMPT_EMBEDS: "(L, D)"}
_FLOATS = ("F16", "BF16", "F32", "F64")
_REWRITE = "write it again with `python launch/cache_latents.py --overwrite`"


@dataclass(frozen=True, kw_only=True)
class SampleHeader:
    """What the header of one sample file says; no tensor is read."""

    path: Path
    """The safetensors file."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of each field."""
    dtypes: Mapping[str, str]
    """Element types as safetensors spells them: F32, BF16, I64, BOOL, ..."""
    metadata: Mapping[str, str]
    """The file's own metadata, such as ``caption``; may be empty."""


def read_header(path: Path) -> SampleHeader:
    """Read and check the header of one sample file.

    Raises:
        ModelSourceError: the file is damaged, holds no field, or a field has an empty axis, or one
            that all families share has the wrong number of dims or type.
    """
    try:
        header = read_safetensors_header(path)
    except ModelSourceError as error:
        raise _damaged(path, error) from error
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in header.tensors.items()}
    metadata = header.metadata
    for name, shape in shapes.items():
        _check_field(path, name, shape, dtypes[name])
    return SampleHeader(path=path, shapes=shapes, dtypes=dtypes, metadata=metadata)


class CachedDataset:
    """Samples of a folder, in the sorted order of their relative paths; sub-folders are included.

    Samples may differ in size and in the length of their prompts: ``bucket`` says which of them
    fit into one batch.

    Example:
        ``CachedDataset("cache")[0]`` is ``{"latents": (C, H, W), "prompt_embeds": (L, D)}`` and
        what else the file holds: floats as float32, integers and booleans as they are, on the CPU.
    """

    def __init__(self, folder: str, repeats: Mapping[str, int] | None = None) -> None:
        """Read every header.

        Args:
            folder: holds ``.safetensors`` files, each with ``latents`` and the fields that the
                family's ``encode_prompt`` returns.
            repeats: sub-folder -> how often each of its samples is seen in an epoch.

        Raises:
            ModelSourceError: the folder is missing, empty or not complete, a file is damaged or
                lacks ``latents``.
            ConfigError: ``repeats`` names no sub-folder of samples.
        """
        self.folder = Path(folder)
        self._latent_dims: int | None = None
        headers = [read_header(path) for path in _sample_files(self.folder)]
        for header in headers:
            _check_latents(header)
        self._headers = _repeated(headers, self.folder, repeats or {})
        empty = sorted(self.folder.rglob(EMPTY_PROMPT), key=lambda path: len(path.parts))
        self._empty = read_header(empty[0]) if empty else None

    def __len__(self) -> int:
        return len(self._headers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Load sample ``index`` to the CPU.

        Raises:
            ModelSourceError: the file changed or went away since the data set was made, or holds
                NaN or infinity.
        """
        header = self._headers[index]
        sample = _load(header)
        sample[LATENTS] = sample[LATENTS].reshape(self._in_axes(header.shapes[LATENTS]))
        return sample

    def name(self, index: int) -> str:
        """Caption of sample ``index``, or the file name where the file carries none."""
        header = self._headers[index]
        return header.metadata.get(CAPTION) or header.path.name

    def key(self, index: int) -> str:
        """Return the path of a sample within the folder: captions may be equal."""
        return self._headers[index].path.relative_to(self.folder).as_posix()

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of sample ``index`` as ``[index]`` returns them, from its header alone."""
        shapes = self._headers[index].shapes
        return {**shapes, LATENTS: self._in_axes(shapes[LATENTS])}

    def bucket(self, index: int) -> Hashable:
        """What samples of one batch have in common: every shape but the length of the prompt."""
        shapes = self.shapes(index)
        if PROMPT_EMBEDS in shapes:
            shapes[PROMPT_EMBEDS] = shapes[PROMPT_EMBEDS][1:]
        return tuple(sorted(shapes.items()))

    def empty_prompt(self) -> dict[str, Tensor] | None:
        """Load what an empty caption is encoded to; None where the folder holds none.

        Raises:
            ModelSourceError: the file changed or went away, or holds NaN or infinity.
        """
        return None if self._empty is None else _load(self._empty)

    def give_frames(self) -> None:
        """From now on ``latents`` of images have a frame axis of size 1, as clips have."""
        self._latent_dims = 4

    def _in_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        missing = 0 if self._latent_dims is None else self._latent_dims - len(shape)
        return (shape[0], *(1,) * missing, *shape[1:])


def _sample_files(folder: Path) -> list[Path]:
    """List the ``.safetensors`` files under a folder, sorted by relative path."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ModelSourceError(
            f"Invalid data folder {str(folder)!r}: it {what}; need a folder of .safetensors"
            " samples; make one with `python launch/cache_latents.py`."
        )
    found = (path for path in folder.rglob("*.safetensors") if path.is_file())
    files = [path for path in found if path.name != EMPTY_PROMPT]
    if not files:
        raise ModelSourceError(
            f"Invalid data folder {str(folder)!r}: found 0 .safetensors files, need at least 1; "
            "make them with `python launch/cache_latents.py`."
        )
    for mark in folder.rglob(f"{UNFINISHED}.*"):
        raise ModelSourceError(
            f"Invalid data folder {str(folder)!r}: it is not complete, {len(files)} samples are"
            f" there and the program that writes them did not end. Run it again as before, or"
            f" remove {str(mark)!r} to train on these."
        )
    # The order must not depend on the file system: sample numbers decide noise and batches.
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _repeated(
    headers: list[SampleHeader], folder: Path, repeats: Mapping[str, Any]
) -> list[SampleHeader]:
    """List each header as often as the innermost of its folders in ``repeats`` says."""
    times = {folder / name: name for name in fields.mapping("data.repeats", repeats)}
    for inner, name in times.items():
        fields.integer(1)(f"data.repeats.{name}", repeats[name])
        if not any(inner in header.path.parents for header in headers):
            allowed = f"sub-folders of {str(folder)!r} that hold samples"
            raise fields.invalid("data.repeats", name, allowed)
    found = []
    for header in headers:
        named = (times[parent] for parent in header.path.parents if parent in times)
        found += [header] * repeats.get(next(named, ""), 1)
    return found


def _load(header: SampleHeader) -> dict[str, Tensor]:
    """Load a file: floats as float32, everything else as it is."""
    # Opened for each read: a file kept open per sample would exceed the usual limit of 1,024.
    try:
        with safe_open(header.path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _damaged(header.path, error) from error
    for name, shape in header.shapes.items():
        _check_loaded(header, name, shape, found.get(name))
    return {
        name: tensor.to(torch.float32) if tensor.is_floating_point() else tensor
        for name, tensor in found.items()
    }


def _check_latents(header: SampleHeader) -> None:
    if LATENTS not in header.shapes:
        raise ModelSourceError(
            f"{header.path}: no field {LATENTS!r}; found {list(header.shapes)}; {_REWRITE}."
        )


def _check_field(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse an empty axis, and a field of all families with other axes or of whole numbers."""
    if 0 in shape:
        raise ModelSourceError(
            f"{path}: {name} has shape {shape}, need every axis >= 1; {_REWRITE}."
        )
    if name not in _ALLOWED_DIMS:
        return
    if len(shape) not in _ALLOWED_DIMS[name]:
        raise ModelSourceError(f"{path}: {name} has shape {shape}, need {_AXES[name]}; {_REWRITE}.")
    if dtype not in _FLOATS:
        raise ModelSourceError(
            f"{path}: {name} has type {dtype}, need one of {', '.join(_FLOATS)}; {_REWRITE}."
        )


def _check_loaded(
    header: SampleHeader, name: str, shape: tuple[int, ...], tensor: Tensor | None
) -> None:
    """Refuse a tensor that is not what its header said, or that would poison the weights."""
    now = None if tensor is None else tuple(tensor.shape)
    if tensor is None or now != shape:
        raise ModelSourceError(
            f"{header.path}: {name} now has shape {now}, need {shape} as when the run began; do not"
            " rewrite samples during a run."
        )
    # One NaN in a batch makes every gradient NaN; the loss would not say which file it was.
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ModelSourceError(
            f"{header.path}: {name} holds NaN or infinity, need finite numbers; {_REWRITE}."
        )


def _damaged(path: Path, error: Exception) -> ModelSourceError:
    """Word the error for a file that safetensors cannot read."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelSourceError(
        f"{path}: not a readable safetensors file ({reason}); need a whole file; {_REWRITE}."
    )
