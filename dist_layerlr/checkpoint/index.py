"""``index.json``: which bytes of which file hold which elements of what, and the step counters.

Read whole, and checked against ``checkpoint.json``, before a load touches anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dist_layerlr import fields
from dist_layerlr.checkpoint.dcp import Scalars, sizes
from dist_layerlr.checkpoint.folders import MANIFEST
from dist_layerlr.checkpoint.manifest import Manifest, read_sealed
from dist_layerlr.checkpoint.schema import (
    checked,
    checksum,
    count,
    finite,
    is_checksum,
    is_count,
    record,
)
from dist_layerlr.errors import ConfigError
from dist_layerlr.weights.tensorfile import DTYPES

INDEX = "index.json"
WEIGHT, OPTIM, SAMPLE, RNG = "weight", "optim", "sample", "rng"
"""First part of a key. The rest is a name; a name and a state key; a name; a rank."""
SAMPLES = 8
"""Elements by which a frozen tensor that is not saved is told from another model's."""
_TORCH_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
# The names that ShardWriter gives to its files. No other name is opened, so that no path in an
# index leads out of the checkpoint's folder.
_FILE = re.compile(r"rank_\d{5,}\.safetensors")
_ADAMS = frozenset({"Adam", "AdamW", "DeepSpeedCPUAdam"})
_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")
"""What Adam's step reads without asking whether it is there."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Where the elements of one span lie on disk."""

    file: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where everything is."""

    metadata: Metadata
    """DCP's; ``storage_data`` maps spans to byte ranges, ``planner_data`` holds numbers by name."""
    headers: dict[str, ByteRange] = field(default_factory=dict)
    """First bytes of each file."""

    def byte_ranges(self) -> Iterator[tuple[str, ByteRange]]:
        """(key, byte range) of every span, and of the headers."""
        for place in self.headers.values():
            yield "header", place
        for index, place in self.metadata.storage_data.items():
            yield index.fqn, place

    def to_json(self) -> str:
        """The text of ``index.json``."""
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


def read_index(folder: Path, manifest: Manifest) -> Index:
    """Read and check ``index.json``: types, ranges, and what the manifest says is there.

    Raises:
        CheckpointError: missing or damaged, naming the file and the field.
    """
    content = read_sealed(folder, INDEX, manifest)
    with checked(folder / INDEX):
        parts = ("headers", "numbers", "runs")
        top = record("index", content, dict.fromkeys(parts, fields.mapping))
        headers = _headers(top["headers"])
        described: dict[str, Any] = {}
        stored: dict[MetadataIndex, ByteRange] = {}
        for key, value in top["runs"].items():
            described[key] = _tensor(key, value, headers, stored)
        metadata = Metadata(described, planner_data=_numbers(top["numbers"]), storage_data=stored)
        index = Index(metadata=metadata, headers=headers)
        _check_keys(index, manifest)
        _check_weights(index, manifest)
        _check_state(index, manifest)
    with checked(folder / MANIFEST):
        for name, row in manifest.parameters.items():
            dtype_named(f"parameters.{name}.dtype", row.dtype)
    return index


def dtype_named(where: str, name: object) -> torch.dtype:
    """The torch dtype of a name in a file.

    It is looked up in a table of our own: ``getattr(torch, name)`` would find functions, too.

    Raises:
        ConfigError: no dtype that a checkpoint can hold.
    """
    if not isinstance(name, str) or name not in _TORCH_DTYPES:
        raise fields.invalid(where, name, "one of " + ", ".join(_TORCH_DTYPES))
    return _TORCH_DTYPES[name]


def _headers(given: Mapping[str, Any]) -> dict[str, ByteRange]:
    headers: dict[str, ByteRange] = {}
    for file, value in given.items():
        where = f"headers.{file}"
        if not _FILE.fullmatch(file):
            raise fields.invalid("headers", file, "file names such as 'rank_00000.safetensors'")
        if not isinstance(value, list) or len(value) != 2:
            raise fields.invalid(where, value, "[bytes, CRC-32]")
        headers[file] = ByteRange(file, 0, count(where, value[0]), checksum(where, value[1]))
    return headers


def _numbers(given: Mapping[str, Any]) -> Scalars:
    numbers: Scalars = {}
    for name, values in given.items():
        numbers[name] = {}
        for key, value in fields.mapping(f"numbers.{name}", values).items():
            where = f"numbers.{name}.{key}"
            if not isinstance(value, list) or len(value) != 2:
                raise fields.invalid(where, value, "[number, dtype or null]")
            number, dtype = value
            # torch's optimizers refuse a counter that is a bool or complex, at their next step.
            if dtype is not None and dtype_named(where, dtype) in (torch.bool, torch.complex64):
                raise fields.invalid(where, value, "a number of an integer or floating-point dtype")
            numbers[name][key] = (finite(where, number), dtype)
    return numbers


def _tensor(
    key: str,
    value: object,
    headers: Mapping[str, ByteRange],
    stored: dict[MetadataIndex, ByteRange],
) -> TensorStorageMetadata:
    """DCP's description of one stored tensor; its byte ranges are added to ``stored``."""
    where = f"runs.{key}"
    row = record(where, value, {"size": count, "dtype": dtype_named, "chunks": _chunk_list})
    dtype: torch.dtype = row["dtype"]
    chunks: list[ChunkStorageMetadata] = []
    end = 0
    for start, numel, file, offset, crc32 in sorted(row["chunks"], key=lambda chunk: chunk[0]):
        nbytes = numel * dtype.itemsize
        if file not in headers or offset < headers[file].nbytes or not is_count(offset + nbytes):
            raise ConfigError(f"Invalid {where}.chunks: {file!r} has no data at byte {offset}")
        if start != end or not numel:
            raise ConfigError(f"Invalid {where}.chunks: elements from {end} on are missing")
        end = start + numel
        place = torch.Size([start])
        chunks.append(ChunkStorageMetadata(offsets=place, sizes=torch.Size([numel])))
        stored[MetadataIndex(key, place)] = ByteRange(file, offset, nbytes, crc32)
    if end != row["size"]:
        raise fields.invalid(f"{where}.size", row["size"], f"{end}, which its chunks hold")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size([end]), chunks)


def _chunk_list(where: str, value: object) -> list[Any]:
    """Rows of (first element, elements, file, first byte, CRC-32).

    One pass without a text for each number: an index of many ranks has millions of them.
    """
    if not isinstance(value, list):
        raise fields.invalid(where, value, "a list")
    for place, row in enumerate(value):
        whole = isinstance(row, list) and len(row) == 5 and isinstance(row[2], str)
        if not whole or not all(map(is_count, (row[0], row[1], row[3]))) or not is_checksum(row[4]):
            allowed = "[first element, elements, file, first byte, CRC-32]"
            raise fields.invalid(f"{where}[{place}]", row, allowed)
    return value


def _check_keys(index: Index, manifest: Manifest) -> None:
    """Every key is of a known kind and of a known name or rank."""
    ranks = [key for key in index.metadata.state_dict_metadata if key.startswith(f"{RNG}.")]
    if len(ranks) != manifest.ranks:
        raise ConfigError(
            f"Invalid runs: {len(ranks)} keys '{RNG}.RANK' for {manifest.ranks} ranks in {MANIFEST}"
        )
    # The count above bounds this list, whatever number the manifest holds.
    known_ranks = set(map(str, range(manifest.ranks)))
    for key in index.metadata.state_dict_metadata:
        kind, _, rest = key.partition(".")
        known = {
            WEIGHT: rest in manifest.parameters,
            SAMPLE: rest in manifest.parameters,
            OPTIM: rest.rpartition(".")[0] in manifest.parameters,
            RNG: rest in known_ranks,
        }
        if not known.get(kind, False):
            raise ConfigError(f"Invalid runs: {key!r} is of nothing that {MANIFEST} lists")
    for name in index.metadata.planner_data or {}:
        if name not in manifest.parameters:
            raise ConfigError(f"Invalid numbers: {name!r} is of nothing that {MANIFEST} lists")


def _check_weights(index: Index, manifest: Manifest) -> None:
    """Everything that the manifest lists is stored, with as many elements as its shape has."""
    stored = sizes(index.metadata)
    for rank in range(manifest.ranks):
        # As many keys as ranks, each of a known rank: every rank has its own.
        if stored[f"{RNG}.{rank}"][1] != torch.uint8:
            raise fields.invalid(f"runs.{RNG}.{rank}.dtype", stored[f"{RNG}.{rank}"][1], "uint8")
    for name, row in manifest.parameters.items():
        numel = prod(row.shape)
        key, wanted = f"{WEIGHT}.{name}", numel
        if not row.saved:
            key, wanted = f"{SAMPLE}.{name}", min(SAMPLES, numel)
        # Tensors without elements are not stored.
        if wanted:
            _check_size(key, stored, wanted)
            # The dtypes may differ, since the master of a bf16 weight is saved in fp32.
            kind, dtype = dtype_named(f"parameters.{name}.dtype", row.dtype), stored[key][1]
            if dtype.is_floating_point != kind.is_floating_point:
                raise fields.invalid(f"runs.{key}.dtype", str(dtype), f"of the kind of {row.dtype}")


def _check_size(key: str, stored: Mapping[str, tuple[int, torch.dtype]], wanted: int) -> None:
    if key not in stored:
        raise ConfigError(f"Invalid runs: {key!r} is missing")
    if stored[key][0] != wanted:
        raise fields.invalid(f"runs.{key}.size", stored[key][0], f"{wanted}, as in {MANIFEST}")


def _check_state(index: Index, manifest: Manifest) -> None:
    """Optimizer state is whole: Adam would fail at its first step, long after the load.

    FusedAdam is left out, because apex keeps its step counter in the group. Adams of other
    libraries keep state under other keys: theirs is checked by its sizes alone.
    """
    stored = sizes(index.metadata)
    tensors: dict[str, set[str]] = {}
    for key in stored:
        kind, _, rest = key.partition(".")
        if kind == OPTIM:
            name, _, leaf = rest.rpartition(".")
            tensors.setdefault(name, set()).add(leaf)
            _check_size(key, stored, prod(manifest.parameters[name].shape))
            _check_size(f"{WEIGHT}.{name}", stored, stored[key][0])
    numbers: Scalars = index.metadata.planner_data or {}
    for name in tensors.keys() | numbers.keys():
        if manifest.stepper_of(name) in _ADAMS:
            found = tensors.get(name, set()) | numbers.get(name, {}).keys()
            if name in tensors and not found & {"exp_avg", "exp_avg_sq"}:
                continue
            for key in _ADAM_STATE:
                if key not in found:
                    raise ConfigError(f"Invalid optimizer state of {name}: {key!r} is missing")
