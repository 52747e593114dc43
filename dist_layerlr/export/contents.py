"""What an export consists of: which tensor becomes which entry of which file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dist_layerlr.plan.entries import Shape
from dist_layerlr.weights.tensorfile import Entry


class TensorInfo(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> Shape: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def trainable(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True, kw_only=True)
class Export:
    """What to write, decided before anything is read."""

    entries: tuple[Entry, ...]
    names: Mapping[str, str]
    """{name in the file: canonical name}."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Scalars that are no tensor of the model: {name in the file: value}."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """What tensors are multiplied by: {name in the file: factor}."""
    metadata: Mapping[str, str]
    stem: str
    texts: Mapping[str, str] = field(default_factory=dict)
    """Further files: {name: content}."""


def entries_of(
    names: Mapping[str, str], table: Mapping[str, TensorInfo], dtype: torch.dtype | None
) -> tuple[Entry, ...]:
    """Shapes and dtypes of the file's tensors, {name in the file: canonical name} given."""
    entries: list[Entry] = []
    for written, name in names.items():
        info = table[name]
        # ``dtype`` is for floating-point tensors: a counter among the buffers stays an integer.
        wanted = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
        entries.append(Entry(name=written, shape=tuple(info.shape), dtype=wanted))
    return tuple(entries)
