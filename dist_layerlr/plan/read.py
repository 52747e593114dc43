"""Names and shapes of a model without loading it, from headers, folders or lists of names."""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.files import read_safetensors_header
from dist_layerlr.plan.entries import ParamInfo, Shape
from dist_layerlr.plan.names import strip_common_module

PEFT_FILE = "adapter_model.safetensors"
"""What PEFT calls the weights of an adapter."""
PIPELINE_PARTS = ("transformer", "transformer_2", "unet")
"""Sub-folders of a diffusers pipeline that hold what is trained; several are told apart by this
prefix."""


def read_model(source: str | Path) -> list[ParamInfo]:
    """List the parameters of a model.

    Args:
        source: a ``.safetensors`` file, a checkpoint folder (diffusers or transformers, sharded or
            not, or a whole pipeline), a tsv of ``name<TAB>shape`` (further columns ignored, ``.gz``
            too), or ``-`` for a tsv on stdin.

    Raises:
        ModelSourceError: nothing there, no safetensors in the folder, or a damaged file.
    """
    path = Path(source)
    if str(source) == "-":
        rows = _read_tsv(sys.stdin, "stdin")
    elif not _exists(path):
        raise ModelSourceError(f"Cannot read model {str(source)!r}: no such file or folder.")
    elif path.is_dir():
        rows = _read_folder(path)
    elif path.suffix == ".safetensors":
        rows = _read_files([path])
    else:
        rows = _read_tsv_file(path)
    names = strip_common_module(name for name, _ in rows)
    shapes = [shape for _, shape in rows]
    return [_info(name, shape) for name, shape in zip(names, shapes, strict=True)]


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files that make up a checkpoint folder.

    They are those that the index lists, or else all that are no variant (``model.fp16``).

    Raises:
        ModelSourceError: none there, or one that the index lists is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelSourceError(f"Cannot read checkpoint folder {str(folder)!r}: no such folder.")
    index = sorted(folder.glob("*.safetensors.index.json"))
    if index:
        return _indexed_files(index[0])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelSourceError(
            f"No .safetensors file in checkpoint folder {str(folder)!r}. Point at the folder that"
            " holds the weights, or convert them with save_pretrained(safe_serialization=True)."
        )
    # An adapter may lie there in several forms: it is read once.
    adapter = [f for f in files if f.name == PEFT_FILE]
    plain = [f for f in files if f.name.count(".") == 1]
    return adapter or plain or files


def parse_shape(text: str) -> Shape:
    """``4096x128``, ``4096,128``, ``(4096, 128)`` or ``[4096, 128]``; empty or ``-`` is a scalar.

    Raises:
        ValueError: anything else.
    """
    inner = text.strip().strip("()[]").strip()
    if inner in ("", "-", "scalar"):
        return ()
    parts = re.split(r"\s*[x,]\s*|\s+", inner.rstrip(", "))
    if not all(map(str.isdecimal, parts)):
        raise ValueError(f"not a shape: {text!r}")
    return tuple(map(int, parts))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system allows
        return False


def _info(name: str, shape: Shape) -> ParamInfo:
    """A kohya ``alpha`` is a constant that is stored beside the adapter."""
    return ParamInfo(
        name=name, shape=shape, trainable=not (name.endswith(".alpha") and shape in ((), (1,)))
    )


def _read_folder(folder: Path) -> list[tuple[str, Shape]]:
    parts = [folder / part for part in PIPELINE_PARTS if any((folder / part).glob("*.safetensors"))]
    if any(folder.glob("*.safetensors")) or not parts:
        return _read_files(checkpoint_files(folder))
    if len(parts) == 1:
        return _read_files(checkpoint_files(parts[0]))
    return [
        (f"{part.name}.{name}", shape)
        for part in parts
        for name, shape in _read_files(checkpoint_files(part))
    ]


def _read_files(files: Iterable[Path]) -> list[tuple[str, Shape]]:
    rows: list[tuple[str, Shape]] = []
    for file in files:
        tensors = read_safetensors_header(file).tensors
        rows += [(name, stored.shape) for name, stored in tensors.items()]
    return rows


def _indexed_files(index: Path) -> list[Path]:
    try:
        listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / name for name in listed]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelSourceError(f"Cannot read checkpoint index {str(index)!r}: {error!r}.") from None
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise ModelSourceError(
            f"Checkpoint folder {str(index.parent)!r} lacks {missing[0]!r}, which its index lists."
        )
    return files


def _read_tsv_file(path: Path) -> list[tuple[str, Shape]]:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                return _read_tsv(lines, str(path))
        with path.open(encoding="utf-8") as lines:
            return _read_tsv(lines, str(path))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ModelSourceError(
            f"Cannot read name list {str(path)!r}: {error}. Expected text lines of name<TAB>shape"
            " (or .gz of it)."
        ) from None


def _read_tsv(lines: Iterable[str], where: str) -> list[tuple[str, Shape]]:
    return list(_tsv_rows(lines, where))


def _tsv_rows(lines: Iterable[str], where: str) -> Iterator[tuple[str, Shape]]:
    for number, line in enumerate(lines, 1):
        columns = line.rstrip("\r\n").split("\t")
        if columns == [""] or (number == 1 and columns[:2] == ["name", "shape"]):
            continue
        try:
            if not columns[0]:
                raise ValueError("no name")
            yield columns[0], parse_shape(columns[1])
        except (IndexError, ValueError):
            raise ModelSourceError(
                f"Invalid line {number} of {where}: {line.strip()[:80]!r}. Expected name<TAB>shape,"
                " shape as 4096x128."
            ) from None
