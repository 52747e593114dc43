"""safetensors files in parts: read elements of one tensor, write a file one tensor at a time.

The safetensors library slices whole rows only, and writes only what is all in memory; shards start
in the middle of a row, and an export must not hold the whole model. Headers, and the format, are
read by ``files.read_safetensors_header``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.files import (
    HEADER_LENGTH,
    StoredTensor,
    read_safetensors_header,
    whole_file,
)
from dist_layerlr.plan.entries import Shape

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
class FileTensor:
    """Where a safetensors file keeps one tensor."""

    name: str
    file: Path
    shape: Shape
    dtype: torch.dtype
    offset: int
    """First byte in the file."""

    def parts(self, start: int, numel: int) -> Iterator[Part]:
        """Where elements [start, start + numel) lie: in one piece here."""
        if numel:
            yield Part(stored=self, start=start, numel=numel)

    def read(self, start: int, numel: int, out: Tensor | None = None) -> Tensor:
        """``read_from``, with the file opened for this one call.

        Raises:
            ModelSourceError: the file ends before, or is gone.
        """
        try:
            # A buffer would read ahead of every span, and copy its bytes once more.
            with self.file.open("rb", buffering=0) as file:
                return self.read_from(file, start, numel, out)
        except OSError as error:
            raise self.unreadable(error) from None

    def read_from(
        self, file: BinaryIO, start: int, numel: int, out: Tensor | None = None
    ) -> Tensor:
        """Read elements [start, start + numel) of the flattened tensor, and nothing else.

        Args:
            file: ``self.file``, opened without a buffer.
            start: first element.
            numel: number of elements.
            out: flat and contiguous CPU memory of ``dtype`` to read into; None: new memory.

        Returns:
            The elements, flat and on the CPU.

        Raises:
            ModelSourceError: the file ends before.
            OSError: the disk fails.
        """
        tensor = torch.empty(numel, dtype=self.dtype) if out is None else out
        view = as_bytes(tensor)
        file.seek(self.offset + start * self.dtype.itemsize)
        if read_into(file, view) < len(view):
            raise ModelSourceError(
                f"File {str(self.file)!r} ends within tensor {self.name!r}. Copy it again."
            )
        return tensor

    def unreadable(self, error: OSError) -> ModelSourceError:
        """The one wording of a file that cannot be opened or read."""
        return ModelSourceError(
            f"Cannot read tensor {self.name!r} of {str(self.file)!r}: {error.strerror}."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive elements of a stored tensor."""

    stored: FileTensor
    start: int
    """First element of the flattened tensor."""
    numel: int

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.stored.offset + self.start * self.stored.dtype.itemsize


def stored_tensors(path: str | Path) -> dict[str, FileTensor]:
    """Where a file keeps each of its tensors. The header is read, once, and nothing else.

    Raises:
        ModelSourceError: missing, truncated or corrupt file, or a dtype that torch lacks.
    """
    path = Path(path)
    tensors = read_safetensors_header(path).tensors
    return {name: _file_tensor(path, name, stored) for name, stored in tensors.items()}


def _file_tensor(path: Path, name: str, stored: StoredTensor) -> FileTensor:
    if stored.dtype not in DTYPES:
        raise ModelSourceError(
            f"Tensor {name!r} in {str(path)!r} is {stored.dtype}, which cannot be trained."
            " Convert it."
        )
    return FileTensor(
        name=name,
        file=path,
        shape=stored.shape,
        dtype=DTYPES[stored.dtype],
        offset=stored.offset,
    )


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
    """Sort entries so that every tensor starts at a multiple of its element size.

    Wide dtypes come first. torch needs that alignment to view the bytes of a mapped file.
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
    with whole_file(path) as temporary, temporary.open("wb", buffering=0) as file:
        write_all(file, memoryview(header(entries, metadata)))
        for entry in entries:
            write_all(file, _bytes_of(fetch(entry), entry))


def header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """First bytes of a file of these tensors, in this order.

    Raises:
        ConfigError: a dtype that the format lacks.
    """
    rows: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        if entry.dtype not in _NAMES:
            raise ConfigError(
                f"Cannot write {entry.name!r}: it is {entry.dtype}, which safetensors files cannot"
                " hold."
            )
        # Offsets count from the end of the header: its own length depends on their digits.
        start, end = end, end + entry.nbytes
        rows[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(rows).encode()
    # Spaces after the JSON are part of the format. They align the data to 8 bytes.
    text += b" " * (-len(text) % 8)
    return HEADER_LENGTH.pack(len(text)) + text


def _bytes_of(tensor: Tensor, entry: Entry) -> memoryview:
    assert tuple(tensor.shape) == tuple(entry.shape), (
        f"{entry.name}: {tuple(tensor.shape)} is not {entry.shape}"
    )
    return as_bytes(tensor.detach().to("cpu", entry.dtype).contiguous())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    # numpy has neither bf16 nor float8; as bytes every dtype passes, and nothing is copied.
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_into(file: BinaryIO, view: memoryview) -> int:
    """Fill ``view`` from an unbuffered file, and return how many bytes there were.

    One ``readinto`` may return less than was asked for: Linux stops at 2 GiB.
    """
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        # The file has ended; the caller knows what it belongs to, and raises.
        if not count:
            break
        done += count
    return done


def write_all(file: BinaryIO, view: memoryview) -> None:
    """Write all of ``view`` to an unbuffered file, which may take less than it is given at once."""
    done = 0
    while done < len(view):
        done += file.write(view[done:])
