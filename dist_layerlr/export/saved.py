"""Weights of a checkpoint on disk, one whole tensor at a time: no model, no process group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load

from dist_layerlr.checkpoint.dcp import LoadPlanner, StoredSpan, accept_one_process, sizes
from dist_layerlr.checkpoint.index import WEIGHT, Index, dtype_named, read_index
from dist_layerlr.checkpoint.manifest import read_manifest
from dist_layerlr.checkpoint.storage import ShardReader, broken
from dist_layerlr.errors import CheckpointError
from dist_layerlr.plan.entries import Shape
from dist_layerlr.plan.names import without_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """What is known of one tensor of a checkpoint before it is read."""

    shape: Shape
    dtype: torch.dtype
    trainable: bool


class SavedWeights:
    """Weights of a checkpoint on disk by canonical name."""

    writes = True

    def __init__(self, path: Path):
        self._path = path
        self.manifest = read_manifest(path)
        index = read_index(path, self.manifest)
        # Only weights are read and checked here; two thirds of an AdamW checkpoint are its state.
        stored = {}
        for at, place in index.metadata.storage_data.items():
            if at.fqn.startswith(f"{WEIGHT}."):
                stored[at] = place
        self._index = Index(metadata=replace(index.metadata, storage_data=stored))
        found = sizes(index.metadata)
        self.table: dict[str, SavedTensor] = {}
        for name, row in self.manifest.parameters.items():
            # Masters are saved in fp32: the stored dtype is the one to export, where there is one.
            key, dtype = f"{WEIGHT}.{name}", dtype_named(name, row.dtype)
            if row.saved and key in found:
                dtype = found[key][1]
            self.table[name] = SavedTensor(shape=row.shape, dtype=dtype, trainable=row.trainable)

    def check(self, names: Iterable[str]) -> None:
        """Read the bytes of all weights once.

        Raises:
            CheckpointError: a changed byte, or a wanted name whose values are not here.
        """
        names = list(names)
        apart = next((name for name in names if without_rank(name) is not None), None)
        if apart is not None:
            raise CheckpointError(
                f"Checkpoint {str(self._path)!r} holds {without_rank(apart)} for each rank: there"
                " is one tensor of a name in a file. Load it into as many ranks."
            )
        absent = next((name for name in names if not self.manifest.parameters[name].saved), None)
        if absent is not None:
            raise CheckpointError(
                f"Checkpoint {str(self._path)!r} leaves out frozen {absent}. Export the adapter, "
                "or save with save_checkpoint(frozen=True)."
            )
        problems = broken(self._path, self._index, 0, 1)
        if problems:
            raise CheckpointError(problems[0])

    def fetch(self, name: str) -> Tensor:
        """The whole tensor, put together from the spans of all ranks that saved it."""
        held = self.table[name]
        size = prod(held.shape)
        flat = torch.empty(size, dtype=held.dtype)
        span = StoredSpan(name=f"{WEIGHT}.{name}", start=0, numel=size, size=size, tensor=flat)
        # A tensor without elements is in no file.
        if size:
            accept_one_process()
            load(
                {},
                storage_reader=ShardReader(self._path, self._index),
                planner=LoadPlanner([span]),
                no_dist=True,
            )
        return flat.view(held.shape)
