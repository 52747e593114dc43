"""What torch.distributed.checkpoint is told to store: runs of elements of flattened, unsharded
tensors.

Every layout holds such runs, whatever wraps the model, so any of them loads what any other has
saved. Planning across ranks, dropping replicas and finding which saved run overlaps which live one
is DCP's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dist_layerlr.errors import CheckpointError

Scalars = dict[str, dict[str, tuple[float, str | None]]]
"""{name: {state key: (value, dtype of the tensor that held it, or None for a plain number)}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Elements [start, start + len) of the flattened tensor that is stored as ``key``."""

    key: str
    start: int
    size: int
    """Elements of the whole tensor."""
    tensor: Tensor
    """Flat and local."""
    home: Tensor | None = None
    """Where ``tensor`` has to be copied after a load, if it is no view."""

    @property
    def place(self) -> str:
        """Unique on a rank."""
        return f"{self.key}@{self.start}"

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """As DCP describes it."""
        return ChunkStorageMetadata(
            offsets=torch.Size([self.start]), sizes=torch.Size([self.tensor.numel()])
        )

    def settle(self) -> None:
        """Call after a load."""
        if self.home is not None:
            self.home.copy_(self.tensor.view(self.home.shape))


class SavePlanner(DefaultSavePlanner):
    """Stores runs, and a few numbers for each name along with the index."""

    def __init__(self, runs: Sequence[Run], scalars: Scalars):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._runs, self._scalars = runs, scalars

    def create_local_plan(self) -> SavePlan:
        """One shard for each run."""
        self.plan = SavePlan([_write_item(run) for run in self._runs], planner_data=self._scalars)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Replicas dropped, numbers of all ranks merged.

        Raises:
            CheckpointError: two ranks disagree about a number, as after steps that skipped a rank.
        """
        merged: Scalars = {}
        for plan in all_plans:
            for name, values in (plan.planner_data or {}).items():
                if merged.setdefault(name, values) != values:
                    raise CheckpointError(
                        f"Cannot save {name}: ranks hold {merged[name]} and {values} for it."
                    )
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=merged)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The tensor of a run; a staged copy in a background save."""
        assert index.offset is not None
        return self.state_dict[f"{index.fqn}@{index.offset[0]}"]


def _write_item(run: Run) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(run.key, torch.Size([run.start])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=run.chunk,
            properties=TensorProperties(dtype=run.tensor.dtype),
            size=torch.Size([run.size]),
        ),
    )


class LoadPlanner(DefaultLoadPlanner):
    """Fills runs from whatever runs were saved."""

    def __init__(self, runs: Sequence[Run]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._runs = {run.place: run for run in runs}
        assert len(self._runs) == len(runs), "two runs of one place: only the last would be read"

    def create_local_plan(self) -> LoadPlan:
        """Reads of all that overlaps.

        Raises:
            CheckpointError: a run is not covered by what was saved.
        """
        assert self.metadata is not None
        saved: Mapping[str, Any] = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        for run in self._runs.values():
            found = (
                create_read_items_for_chunk_list(run.key, saved[run.key], [run.chunk])
                if run.key in saved
                else []
            )
            covered = sum(item.lengths[0] for item in found)
            if covered != run.tensor.numel():
                raise CheckpointError(
                    f"The checkpoint holds {covered} of the {run.tensor.numel()} elements of"
                    f" {run.key} from {run.start} on. It was not written whole; resume from another"
                    " one."
                )
            items += found
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The elements of a run that one read fills."""
        index = read_item.dest_index
        assert index.offset is not None
        run = self._runs[f"{index.fqn}@{index.offset[0]}"]
        return run.tensor.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])


def sizes(metadata: Metadata) -> dict[str, tuple[int, torch.dtype]]:
    """{key: (elements, dtype)} of everything stored."""
    return {
        key: (row.size[0], row.properties.dtype)
        for key, row in metadata.state_dict_metadata.items()
        if isinstance(row, TensorStorageMetadata)
    }


def accept_one_process() -> None:
    """Silence torch's warning of a checkpoint without a process group: here that is meant."""
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
    )
