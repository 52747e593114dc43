"""Which sample has which number: a function of the seed and the number alone, on every rank."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch

from launch.trainer.data.base import Dataset
from launch.trainer.seeds import ORDER_STREAM, mix_seed

_BATCHES = -1
"""Where the number of a bucket stands in a seed: the order of the batches of all buckets."""


def buckets_of(data: Dataset) -> tuple[tuple[int, ...], ...]:
    """Group the samples that fit into one batch, as the data set's ``bucket`` says.

    One group where it has no such method: then all samples have one size, or the family takes
    several sizes in a batch.
    """
    bucket = getattr(data, "bucket", None)
    if bucket is None:
        return (tuple(range(len(data))),)
    found: dict[Hashable, list[int]] = {}
    for index in range(len(data)):
        found.setdefault(bucket(index), []).append(index)
    return tuple(tuple(members) for members in found.values())


def one_batch(data: Dataset, count: int) -> tuple[int, ...]:
    """The first samples of the data set that fit into one batch, at most ``count``."""
    return buckets_of(data)[0][:count]


class Order:
    """The samples of a run by number, in a fresh order every epoch.

    With one bucket an epoch is a permutation, and a batch may straddle two. With several, all
    samples of a batch are of one bucket, batches of all buckets come in random order, and the last
    batch of a bucket is filled up with samples that the epoch has seen already.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int]], seed: int, batch: int, begun: int = 0
    ) -> None:
        """Bind the order to its run.

        Args:
            buckets: Of ``buckets_of``.
            seed: Of the run.
            batch: Samples of a step, over all ranks.
            begun: Samples seen before this process. Where a run goes on with another size of
                batch, its numbers do not begin at the border of a batch: the borders move with
                them, so that up to ``batch - 1`` samples are seen again.
        """
        self._buckets = tuple(tuple(members) for members in buckets)
        self._seed, self._batch = seed, batch
        self._moved = begun % batch if len(self._buckets) > 1 else 0
        self._batches_of = lru_cache(maxsize=2)(self._shuffled)

    def index(self, number: int) -> int:
        """Index in the data set of sample ``number`` of the run."""
        if len(self._buckets) == 1:
            # Indices of a single bucket are those of the data set.
            return sample_index(number, len(self._buckets[0]), self._seed)
        batch, place = divmod(number - self._moved, self._batch)
        epoch, position = divmod(batch, self._epoch_batches)
        return self._batches_of(epoch)[position][place]

    @property
    def epoch(self) -> int:
        """Samples of an epoch."""
        return sum(map(len, self._buckets)) + self.filled

    @property
    def filled(self) -> int:
        """Samples of an epoch that are seen again to fill up batches."""
        if len(self._buckets) == 1:
            return 0
        return self._epoch_batches * self._batch - sum(map(len, self._buckets))

    @property
    def buckets(self) -> int:
        """How many there are."""
        return len(self._buckets)

    @property
    def _epoch_batches(self) -> int:
        return sum(-(-len(members) // self._batch) for members in self._buckets)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        batches: list[list[int]] = []
        for number, members in enumerate(self._buckets):
            order = _permutation(len(members), self._seed, epoch, number)
            # Over and over: a small bucket may not fill one batch even when seen twice.
            whole = -(-len(order) // self._batch) * self._batch
            drawn = [members[order[i % len(order)]] for i in range(whole)]
            batches += [drawn[i : i + self._batch] for i in range(0, whole, self._batch)]
        return [batches[i] for i in _permutation(len(batches), self._seed, epoch, _BATCHES)]


def sample_index(number: int, length: int, seed: int) -> int:
    """Index of sample ``number`` in a data set of one bucket: a fresh permutation every epoch."""
    epoch, position = divmod(number, length)
    return _epoch(length, seed, epoch)[position]


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch(length: int, seed: int, epoch: int) -> list[int]:
    return _permutation(length, seed, epoch)


def _permutation(length: int, seed: int, *what: int) -> list[int]:
    """Return a permutation of ``range(length)``; ``what`` is the epoch, or epoch and bucket."""
    generator = torch.Generator().manual_seed(mix_seed(seed, ORDER_STREAM, *what))
    found: list[int] = torch.randperm(length, generator=generator).tolist()
    return found
