"""What torch.distributed.checkpoint is told to store: spans of flattened, unsharded tensors.

Every layout holds such spans, whatever wraps the model, so any of them loads what any other has
saved. DCP plans across ranks, drops replicas, and finds which saved span overlaps which live one.

torch 2.14 has a protocol for the same idea, ``torch.distributed.checkpoint.protocol.
CheckpointableTensor``: ``global_shape``, ``global_offsets``, ``local_offsets`` and ``local_sizes``
on a plain tensor. A ``StoredSpan`` is its one-dimensional case: ``(size,)``, ``(start,)``, ``(0,)``
and ``(numel,)``. When 2.14 is the oldest torch that is supported, the two planners below can go.
"""

from __future__ import annotations

import warnings
from collections import Counter
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
from dist_layerlr.sharders.base import HeldSpan

Scalars = dict[str, dict[str, tuple[float, str | None]]]
"""{name: {state key: (value, dtype of the tensor that held it, or None for a plain number)}}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSpan(HeldSpan):
    """A span of a tensor in the checkpoint, and the memory that is saved or filled.

    ``name`` is the tensor's key in the checkpoint: ``weight.FQN``, ``optim.FQN.STATE_KEY``,
    ``sample.FQN`` or ``rng.RANK``.
    """

    size: int
    """Elements of the whole tensor."""
    replicas: int = 1
    """Ranks that hold each element, and of which one writes it."""

    @property
    def place(self) -> str:
        """Unique on a rank: a rank may hold several spans of one tensor."""
        return f"{self.name}@{self.start}"

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """As DCP describes it."""
        return ChunkStorageMetadata(
            offsets=torch.Size([self.start]), sizes=torch.Size([self.numel])
        )


class SavePlanner(DefaultSavePlanner):
    """Stores spans, and a few numbers for each name along with the index."""

    def __init__(self, spans: Sequence[StoredSpan], scalars: Scalars):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._spans, self._scalars = spans, scalars

    def create_local_plan(self) -> SavePlan:
        """One shard for each span."""
        items = [_write_item(span) for span in self._spans]
        self.plan = SavePlan(items, planner_data=self._scalars)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Drop replicas and merge the numbers of all ranks.

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
        """The tensor of a span.

        It is taken from ``state_dict``, not from the span, because in a background save DCP has
        put copies on the host there, while training changes the span's own memory.
        """
        return self.state_dict[_place(index)]


def _place(index: MetadataIndex) -> str:
    """As ``StoredSpan.place``."""
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"


def _write_item(span: StoredSpan) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(span.name, torch.Size([span.start])),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=span.chunk,
            properties=TensorProperties(dtype=span.tensor.dtype),
            size=torch.Size([span.size]),
        ),
    )


class LoadPlanner(DefaultLoadPlanner):
    """Fills spans from whatever spans were saved."""

    def __init__(self, spans: Sequence[StoredSpan]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._spans = {span.place: span for span in spans}
        self._distinct = len(self._spans) == len(spans)

    def create_local_plan(self) -> LoadPlan:
        """Reads of all that overlaps.

        Raises:
            CheckpointError: a span is not covered by what was saved.
        """
        # Asserted here, not in __init__, because DCP agrees over ranks on what this raises.
        assert self._distinct, "two spans of one place: only the last would be read"
        assert self.metadata is not None
        saved: Mapping[str, Any] = self.metadata.state_dict_metadata
        items: list[ReadItem] = []
        # All spans of a tensor at once: DCP sorts the saved ones anew in each call.
        for key, spans in self._by_key().items():
            if key in saved:
                chunks = [span.chunk for span in spans]
                items += create_read_items_for_chunk_list(key, saved[key], chunks)
        covered: Counter[str] = Counter()
        for item in items:
            covered[_place(item.dest_index)] += item.lengths[0]
        for place, span in self._spans.items():
            # DCP itself leaves elements that nobody saved as they are, without a word.
            if covered[place] != span.numel:
                raise CheckpointError(
                    f"The checkpoint holds {covered[place]} of the {span.numel} elements of"
                    f" {span.name} from {span.start} on. It was not written whole; resume from"
                    " another one."
                )
        return LoadPlan(items)

    def _by_key(self) -> dict[str, list[StoredSpan]]:
        found: dict[str, list[StoredSpan]] = {}
        for span in self._spans.values():
            found.setdefault(span.name, []).append(span)
        return found

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The elements of a span that one read fills: a view, so that the file is read in place."""
        span = self._spans[_place(read_item.dest_index)]
        return span.tensor.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])


def sizes(metadata: Metadata) -> dict[str, tuple[int, torch.dtype]]:
    """{key: (elements, dtype)} of everything stored."""
    found: dict[str, tuple[int, torch.dtype]] = {}
    for key, row in metadata.state_dict_metadata.items():
        if isinstance(row, TensorStorageMetadata):
            found[key] = (row.size[0], row.properties.dtype)
    return found


def accept_one_process() -> None:
    """Silence torch's warning of a checkpoint without a process group: here that is meant."""
    warnings.filterwarnings(
        "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
    )
