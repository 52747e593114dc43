"""Samples that are held out of training: which ones, by their names alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from dist_layerlr import fields
from launch.trainer.data.base import Dataset, Sample
from launch.trainer.validation_options import ValidationOptions

_BITS = 63
_BY_INDEX = ("bucket", "key", "shapes")
"""Methods of some data sets that take the number of a sample."""


class Part:
    """Some samples of a data set, which otherwise is what the whole is. Satisfies ``Dataset``."""

    def __init__(self, data: Dataset, indices: Sequence[int]) -> None:
        """Bind to the samples with these numbers."""
        self._data, self._indices = data, tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._data[self._indices[index]]

    def name(self, index: int) -> str:
        """Return the label of a sample."""
        return self._data.name(self._indices[index])

    def __getattr__(self, name: str) -> Any:
        # A data set without buckets must stay one without: whoever asks, asks by attribute.
        found = getattr(self._data, name)
        if name not in _BY_INDEX:
            return found
        return lambda index: found(self._indices[index])


def key_of(data: Dataset, index: int) -> str:
    """What tells a sample from others: equal for copies of one sample, and the same in every run.

    The data set's ``key`` where its names are for people only.
    """
    key: Any = getattr(data, "key", data.name)
    return str(key(index))


def digest_of(key: str) -> int:
    """A number in [0, 2**63) that is evenly spread over samples."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def split(data: Dataset, options: ValidationOptions) -> tuple[Dataset, Dataset | None]:
    """Return the samples that train, and those that never do; of their copies one each.

    Raises:
        ConfigError: nothing is left to train.
    """
    if not options.on:
        return data, None
    first: dict[str, int] = {}
    keys = [key_of(data, index) for index in range(len(data))]
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    ranked = sorted(first, key=digest_of)
    if options.count is not None:
        if options.count >= len(ranked):
            allowed = f"below {len(ranked)}, the number of different samples"
            raise fields.invalid("validation.count", options.count, allowed)
        held = set(ranked[: options.count])
    else:
        assert options.share is not None, "one of them is given where it is on"
        limit = options.share * (1 << _BITS)
        # The first one in any case: a small share of a small data set may fall between all digests.
        held = {key for key in ranked if digest_of(key) < limit} | {ranked[0]}
        if len(held) == len(ranked):
            allowed = f"a share that leaves some of {len(ranked)} different samples to train"
            raise fields.invalid("validation.share", options.share, allowed)
    training = [index for index, key in enumerate(keys) if key not in held]
    return Part(data, training), Part(data, sorted(first[key] for key in held))
