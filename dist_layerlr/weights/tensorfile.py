"""safetensors files in parts: read a run of elements of one tensor, write a file one tensor at a
time.

The safetensors library checks what is read here, and reads what is written here; it offers neither
of the two itself. The format: 8 bytes of header length, a JSON header ``{name: {"dtype", "shape",
"data_offsets"}}``, the raw data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.files import whole_file
from dist_layerlr.plan.entries import Shape
from dist_layerlr.plan.read import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor in a file."""

    name: str
    file: Path
    shape: Shape
    dtype: torch.dtype
    offset: int
    """First byte in the file."""

    def read(self, start: int, numel: int, out: Tensor | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor, on the CPU.

        Nothing else is read.

        Args:
            start: first element.
            numel: number of elements.
            out: flat and contiguous CPU memory of ``dtype`` to read into; None: new memory.

        Raises:
            ModelSourceError: the file ends before, or is gone.
        """
        tensor = torch.empty(numel, dtype=self.dtype) if out is None else out
        view = tensor.view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset + start * self.dtype.itemsize)
                done = 0
                while done < len(view) and (count := file.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise ModelSourceError(
                f"Cannot read tensor {self.name!r} of {str(self.file)!r}: {error.strerror}."
            ) from None
        if done < len(view):
            raise ModelSourceError(
                f"File {str(self.file)!r} ends within tensor {self.name!r}. Copy it again."
            )
        return tensor


def stored_tensors(path: str | Path) -> dict[str, Stored]:
    """Where a file keeps each of its tensors. Only the header is read.

    Raises:
        ModelSourceError: missing, truncated or corrupt file, or a dtype that torch lacks.
    """
    path = Path(path)
    read_header(path)  # the library's own check: offsets, sizes, length of the file
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = next((name for name, row in header.items() if row["dtype"] not in DTYPES), None)
    if unknown is not None:
        found = header[unknown]["dtype"]
        raise ModelSourceError(
            f"Tensor {unknown!r} in {str(path)!r} is {found}, which cannot be trained. Convert it."
        )
    return {
        name: Stored(
            name=name,
            file=path,
            shape=tuple(row["shape"]),
            dtype=DTYPES[row["dtype"]],
            offset=8 + length + row["data_offsets"][0],
        )
        for name, row in header.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def file_order(entries: Sequence[Entry]) -> list[Entry]:
    """Wide dtypes first: every tensor then starts at a multiple of its element size, which torch
    needs to view it.
    """
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def write(
    path: Path,
    entries: Sequence[Entry],
    fetch: Callable[[Entry], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file whole or not at all, holding one tensor at a time.

    Args:
        path: of the file; its folder exists.
        entries: in the order of ``file_order``.
        fetch: the tensor of an entry, called once for each, in order.
        metadata: for the header.

    Raises:
        OSError: no room, no rights. The temporary file is removed.
    """
    with whole_file(path) as temporary, temporary.open("wb") as file:
        file.write(header(entries, metadata))
        for entry in entries:
            _append(file, fetch(entry), entry)


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """First bytes of a file of these tensors, in this order.

    Raises:
        ConfigError: a dtype that the format lacks.
    """
    unknown = next((entry for entry in entries if entry.dtype not in _NAMES), None)
    if unknown is not None:
        raise ConfigError(
            f"Cannot write {unknown.name!r}: it is {unknown.dtype}, which safetensors files cannot"
            " hold."
        )
    rows: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        rows[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _append(file: BinaryIO, tensor: Tensor, entry: Entry) -> None:
    assert tuple(tensor.shape) == tuple(entry.shape), (
        f"{entry.name}: {tuple(tensor.shape)} is not {entry.shape}"
    )
    data = tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8)
    file.write(data.numpy().data)
