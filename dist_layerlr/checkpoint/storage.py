"""Where DCP's runs lie on disk: one safetensors file per rank, one JSON index, a CRC-32 of every
run.

DCP's own files hold zip records whose CRC torch computes at 0.5 GB/s when it writes and never
checks when it reads, and a pickled index. zlib's CRC-32 runs at 4 GB/s, and raw bytes are read
straight into place.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dist_layerlr.checkpoint.manifest import damaged
from dist_layerlr.errors import CheckpointError
from dist_layerlr.weights import tensorfile

INDEX = "index.json"
_BUFFER = 1 << 22


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of one run on disk."""

    file: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where everything is."""

    metadata: Metadata
    """DCP's; ``storage_data`` maps runs to their Place, ``planner_data`` holds numbers by name."""
    headers: dict[str, Place] = field(default_factory=dict)
    """First bytes of each file."""

    def places(self) -> Iterator[tuple[str, Place]]:
        """(key, place) of every run, and of the headers."""
        yield from (("header", place) for place in self.headers.values())
        yield from ((index.fqn, place) for index, place in self.metadata.storage_data.items())

    def to_json(self) -> str:
        """As text."""
        runs: dict[str, Any] = {}
        for key, row in self.metadata.state_dict_metadata.items():
            assert isinstance(row, TensorStorageMetadata)
            chunks = []
            for chunk in row.chunks:
                place = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                chunks.append(
                    [chunk.offsets[0], chunk.sizes[0], place.file, place.offset, place.crc32]
                )
            dtype = str(row.properties.dtype).removeprefix("torch.")
            runs[key] = {"size": row.size[0], "dtype": dtype, "chunks": chunks}
        headers = {file: [place.nbytes, place.crc32] for file, place in self.headers.items()}
        return json.dumps({"headers": headers, "numbers": self.metadata.planner_data, "runs": runs})


def read_index(content: Any) -> Index:
    """From the parsed JSON of ``Index.to_json``."""
    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, Place] = {}
    for key, row in content["runs"].items():
        dtype = getattr(torch, row["dtype"])
        chunks = []
        for start, numel, file, offset, crc32 in row["chunks"]:
            chunks.append(
                ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([numel]))
            )
            stored[MetadataIndex(key, torch.Size([start]))] = Place(
                file, offset, numel * dtype.itemsize, crc32
            )
        described[key] = TensorStorageMetadata(
            TensorProperties(dtype=dtype), torch.Size([row["size"]]), chunks
        )
    metadata = Metadata(described, planner_data=content["numbers"], storage_data=stored)
    headers = {
        file: Place(file, 0, nbytes, crc32) for file, (nbytes, crc32) in content["headers"].items()
    }
    return Index(metadata=metadata, headers=headers)


class ShardWriter(StorageWriter):
    """Writes this rank's runs into one file; the coordinator then hands the index to ``finish``."""

    def __init__(self, folder: Path, rank: int, finish: Callable[[Index], None]):
        super().__init__()
        self._folder, self._rank, self._finish = folder, rank, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Header, then run after run; at most one of them is copied to the host at a time.

        Raises:
            CheckpointError: no room or no rights, naming file and tensor.
        """
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner) if plan.items else [])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        path = self._folder / f"rank_{self._rank:05d}.safetensors"
        items = {_label(item.index): item for item in plan.items}
        order = tensorfile.file_order([_entry(label, item) for label, item in items.items()])
        results = []
        at = "the header"
        try:
            with path.open("wb", buffering=0) as file:
                results.append(
                    _append(
                        file, MetadataIndex(path.name), memoryview(tensorfile.header(order, {}))
                    )
                )
                for entry in order:
                    at, item = items[entry.name].index.fqn, items[entry.name]
                    data = planner.resolve_data(item)
                    assert isinstance(data, Tensor)
                    results.append(
                        _append(file, item.index, as_bytes(data.detach().cpu().contiguous()))
                    )
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"Cannot write checkpoint file {str(path)!r}, at {at}: {error.strerror}. Make room,"
                " or save elsewhere; the checkpoints that are complete stay."
            ) from None
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on the coordinator when all ranks have written."""
        places: dict[MetadataIndex, Place] = {
            r.index: r.storage_data for rank in results for r in rank
        }
        headers = {index.fqn: place for index, place in places.items() if index.offset is None}
        metadata.storage_data = {
            index: place for index, place in places.items() if index.offset is not None
        }
        self._finish(Index(metadata=metadata, headers=headers))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not chosen by path."""
        return False


class ShardReader(StorageReader):
    """Reads runs of bytes straight into live tensors. Check them first: ``broken``."""

    def __init__(self, folder: Path, index: Index):
        super().__init__()
        self._folder, self._index = folder, index

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """From the index, which is read already."""
        return self._index.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """File by file, in the order of bytes."""
        described = self._index.metadata.state_dict_metadata
        reads = sorted(
            ((self._index.metadata.storage_data[item.storage_index], item) for item in plan.items),
            key=lambda read: (read[0].file, read[0].offset, read[1].storage_offsets[0]),
        )
        files: dict[str, Any] = {}
        try:
            for place, item in reads:
                row = described[item.storage_index.fqn]
                assert isinstance(row, TensorStorageMetadata)
                path = self._folder / place.file
                file = files.get(place.file) or files.setdefault(
                    place.file, path.open("rb", buffering=0)
                )
                file.seek(place.offset + item.storage_offsets[0] * row.properties.dtype.itemsize)
                _read_into(file, planner.resolve_tensor(item).detach(), row.properties.dtype, path)
        finally:
            for file in files.values():
                file.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not chosen by path."""
        return False


def broken(folder: Path, index: Index, rank: int, ranks: int) -> list[str]:
    """Read this rank's share of all bytes and say which files are missing, short or changed, and of
    which tensor.
    """
    places = sorted(index.places(), key=lambda p: (p[1].file, p[1].offset))
    total = sum(place.nbytes for _, place in places)
    shares: dict[str, list[tuple[str, Place]]] = {}
    before = 0
    for key, place in places:
        if before * ranks // max(total, 1) == rank:
            shares.setdefault(place.file, []).append((key, place))
        before += place.nbytes
    return [
        problem for file, share in shares.items() for problem in _broken_in(folder / file, share)
    ]


def _broken_in(path: Path, places: Sequence[tuple[str, Place]]) -> list[str]:
    buffer, found, key = bytearray(_BUFFER), [], places[0][0]
    try:
        with path.open("rb", buffering=0) as file:
            for key, place in places:
                if reason := _check(file, place, buffer):
                    found.append(f"{reason}, at {key}")
    except OSError as error:
        found.append(f"{error.strerror}, at {key}")
    return [str(damaged(path, reason)) for reason in found]


def _check(file: Any, place: Place, buffer: bytearray) -> str | None:
    view, crc, left = memoryview(buffer), 0, place.nbytes
    file.seek(place.offset)
    while left and (count := file.readinto(view[: min(left, len(view))])):
        crc, left = zlib.crc32(view[:count], crc), left - count
    if left:
        return "it ends too early"
    return None if crc == place.crc32 else "bytes have changed"


def _read_into(file: Any, target: Tensor, dtype: torch.dtype, path: Path) -> None:
    direct = target.dtype == dtype and target.device.type == "cpu"
    tensor = target if direct else torch.empty(target.shape, dtype=dtype)
    view, done = as_bytes(tensor), 0
    while done < len(view) and (count := file.readinto(view[done:])):
        done += count
    if done < len(view):
        raise damaged(path, "it ends too early")
    if not direct:
        target.copy_(tensor)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _append(file: Any, index: MetadataIndex, data: memoryview) -> WriteResult:
    offset, done = file.tell(), 0
    while done < len(data):
        done += file.write(data[done:])
    place = Place(Path(file.name).name, offset, len(data), zlib.crc32(data))
    return WriteResult(index=index, size_in_bytes=len(data), storage_data=place)


def _label(index: MetadataIndex) -> str:
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"


def _entry(label: str, item: Any) -> tensorfile.Entry:
    data = item.tensor_data
    return tensorfile.Entry(name=label, shape=tuple(data.chunk.sizes), dtype=data.properties.dtype)
