"""Where DCP's spans lie on disk: one safetensors file per rank, one JSON index, a CRC-32 of each.

DCP's own files hold zip records whose CRC torch computes at 0.5 GB/s when it writes and never
checks when it reads, and a pickled index. zlib's CRC-32 runs at 4 GB/s, and raw bytes are read
straight into place.

``HuggingFaceStorageWriter`` and ``HuggingFaceStorageReader`` of torch.distributed.checkpoint write
safetensors files, too. They are not used here, because they keep no checksum of the data, and
because they put the index into the header of every file: a load on N ranks then reads N headers on
each before it knows where anything is.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from dist_layerlr.checkpoint.index import ByteRange, Index
from dist_layerlr.checkpoint.schema import damaged
from dist_layerlr.errors import CheckpointError
from dist_layerlr.weights import tensorfile

_BUFFER = 1 << 22
"""Bytes checked at once: they stay in the CPU's cache between the read and the CRC."""


class ShardWriter(StorageWriter):
    """Writes this rank's spans to one file; the coordinator then passes the index to ``finish``."""

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
        """Header, then span after span; at most one of them is copied to the host at a time.

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
                header = memoryview(tensorfile.header(order, {}))
                # An index without an offset marks the header: finish() sorts it out by that.
                results.append(_append(file, MetadataIndex(path.name), header))
                for entry in order:
                    item = items[entry.name]
                    at = item.index.fqn
                    data = planner.resolve_data(item)
                    assert isinstance(data, Tensor)
                    data = data.detach().cpu().contiguous()
                    results.append(_append(file, item.index, tensorfile.as_bytes(data)))
                # The coordinator renames the folder once all ranks have returned from here: the
                # data must be on disk by then.
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"Cannot write checkpoint file {str(path)!r}, at {at}: {error.strerror}. Make room,"
                " or save elsewhere; the checkpoints that are complete stay."
            ) from None
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """DCP calls this on the coordinator when all ranks have written."""
        headers: dict[str, ByteRange] = {}
        spans: dict[MetadataIndex, ByteRange] = {}
        for rank in results:
            for result in rank:
                if result.index.offset is None:
                    headers[result.index.fqn] = result.storage_data
                else:
                    spans[result.index] = result.storage_data
        metadata.storage_data = spans
        self._finish(Index(metadata=metadata, headers=headers))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not chosen by path."""
        return False


class ShardReader(StorageReader):
    """Reads bytes of spans straight into live tensors. Check them first: ``broken``."""

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
        """File by file, in the order of bytes; each file is opened once."""
        described = self._index.metadata.state_dict_metadata
        reads = []
        for item in plan.items:
            row = described[item.storage_index.fqn]
            assert isinstance(row, TensorStorageMetadata)
            dtype = row.properties.dtype
            place = self._index.metadata.storage_data[item.storage_index]
            first = place.offset + item.storage_offsets[0] * dtype.itemsize
            reads.append((place.file, first, dtype, item))
        files: dict[str, BinaryIO] = {}
        # The stack closes every file at the end, also when a read fails.
        with ExitStack() as opened:
            for name, first, dtype, item in sorted(reads, key=lambda read: read[:2]):
                path = self._folder / name
                if name not in files:
                    files[name] = opened.enter_context(path.open("rb", buffering=0))
                files[name].seek(first)
                _read_into(files[name], planner.resolve_tensor(item).detach(), dtype, path)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Not chosen by path."""
        return False


def broken(folder: Path, index: Index, rank: int, ranks: int) -> list[str]:
    """Read this rank's share of all bytes and compare their checksums.

    Args:
        folder: of the checkpoint.
        index: of its bytes.
        rank: whose share: every byte is read by one rank.
        ranks: number of shares.

    Returns:
        Errors that say which files are missing, short or changed, and at which tensor.
    """
    places = sorted(index.byte_ranges(), key=lambda row: (row[1].file, row[1].offset))
    total = max(sum(place.nbytes for _, place in places), 1)
    shares: dict[str, list[tuple[str, ByteRange]]] = {}
    before = 0
    for key, place in places:
        # Equal shares of bytes, not of spans: a range belongs to the rank in whose share it begins.
        if before * ranks // total == rank:
            shares.setdefault(place.file, []).append((key, place))
        before += place.nbytes
    problems: list[str] = []
    for file, share in shares.items():
        problems += _broken_in(folder / file, share)
    return problems


def _broken_in(path: Path, places: Sequence[tuple[str, ByteRange]]) -> list[str]:
    buffer, found, key = bytearray(_BUFFER), [], places[0][0]
    try:
        with path.open("rb", buffering=0) as file:
            for key, place in places:
                reason = _check(file, place, buffer)
                if reason is not None:
                    found.append(str(damaged(path, f"{reason}, at {key}")))
    except OSError as error:
        found.append(str(damaged(path, f"{error.strerror}, at {key}")))
    return found


def _check(file: BinaryIO, place: ByteRange, buffer: bytearray) -> str | None:
    view, crc, left = memoryview(buffer), 0, place.nbytes
    file.seek(place.offset)
    while left:
        part = view[: min(left, len(view))]
        if tensorfile.read_into(file, part) < len(part):
            return "it ends too early"
        crc, left = zlib.crc32(part, crc), left - len(part)
    return None if crc == place.crc32 else "bytes have changed"


def _read_into(file: BinaryIO, target: Tensor, dtype: torch.dtype, path: Path) -> None:
    direct = target.dtype == dtype and target.device.type == "cpu"
    tensor = target if direct else torch.empty(target.shape, dtype=dtype)
    view = tensorfile.as_bytes(tensor)
    if tensorfile.read_into(file, view) < len(view):
        raise damaged(path, "it ends too early")
    if not direct:
        target.copy_(tensor)


def _append(file: Any, index: MetadataIndex, data: memoryview) -> WriteResult:
    place = ByteRange(Path(file.name).name, file.tell(), len(data), zlib.crc32(data))
    tensorfile.write_all(file, data)
    return WriteResult(index=index, size_in_bytes=len(data), storage_data=place)


def _label(index: MetadataIndex) -> str:
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"


def _entry(label: str, item: Any) -> tensorfile.Entry:
    data = item.tensor_data
    return tensorfile.Entry(name=label, shape=tuple(data.chunk.sizes), dtype=data.properties.dtype)
