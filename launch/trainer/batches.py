"""The batches of a run: which samples, and which of them without their caption."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import unwrap
from launch.trainer.data.base import Batch, Dataset, Sample, to_device
from launch.trainer.data.order import Order, buckets_of
from launch.trainer.families.base import Family, live_config
from launch.trainer.job import Job
from launch.trainer.options import RunOptions
from launch.trainer.prefetch import Prefetch, pinned
from launch.trainer.runtime import Runtime
from launch.trainer.seeds import DROPOUT_STREAM, mix_seed
from launch.trainer.state import Position

Numbers = tuple[int, ...]
"""Of the samples of a microbatch."""
_SEEDS = 1 << 63
"""``mix_seed`` returns whole numbers below it."""


class Batches:
    """Reads the samples of a run by their numbers, the same ones at any number of ranks."""

    def __init__(self, job: Job, begin: Position) -> None:
        """Bind to a run that begins or continues at ``begin``. Collective."""
        self.begin = begin
        self._job, train = job, job.options.train
        self._order = alike(lambda: order_of(job, begin))
        self._empty: Sample = {}
        self._config = live_config(unwrap(job.engine.model))
        self._tokens, self._waited = 0, 0.0
        device, steps = job.runtime.device, range(begin.step, train.steps)
        if train.caption_dropout > 0:
            self._empty = alike(lambda: empty_prompt(job.data, job.family))
        parts = (microbatches(job.options, job.runtime, begin, step) for step in steps)
        self._ahead = Prefetch(self._made, chain.from_iterable(parts), train.workers, device)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead.close()

    def read(self, numbers: Numbers) -> Batch:
        """Read the samples with these numbers onto the device.

        Collective: ranks fail together on a broken sample.
        """
        device, started = self._job.runtime.device, time.perf_counter()
        made, tokens = alike(lambda: self._ahead.get(numbers))
        batch: Batch = to_device(made, device)
        self._tokens += tokens
        self._waited += time.perf_counter() - started
        return batch

    def counted(self) -> tuple[float, float]:
        """Tokens that this rank has read since the last call, and the seconds that it took."""
        found = float(self._tokens), self._waited
        self._tokens, self._waited = 0, 0.0
        return found

    def _made(self, numbers: Numbers) -> tuple[Batch, int]:
        """Return a microbatch in host memory, and its tokens. Called in threads."""
        train, data = self._job.options.train, self._job.data
        samples: list[Sample] = [data[self._order.index(number)] for number in numbers]
        for i, number in enumerate(numbers):
            if loses_caption(number, train.seed, train.caption_dropout):
                samples[i] = {**samples[i], **self._empty}
        family = self._job.family
        tokens = sum(family.tokens(self._config, sample) for sample in samples)
        return pinned(family.collate(samples), self._job.runtime.device), tokens


def micro_batch_size(options: RunOptions, world_size: int) -> int:
    """Samples per forward on one rank.

    Raises:
        ConfigError: train.micro_batch does not divide the rank's share of the batch.
    """
    share = options.train.global_batch // world_size
    micro = options.train.micro_batch or share
    if share % micro:
        raise ConfigError(
            f"Invalid train.micro_batch={micro}: must divide {share}, each rank's share of"
            " train.global_batch."
        )
    return micro


def microbatches(
    options: RunOptions, runtime: Runtime, begin: Position, step: int
) -> list[Numbers]:
    """Return the numbers of the samples of each microbatch of a step on this rank."""
    settings, micro = options.train, micro_batch_size(options, runtime.world_size)
    share = settings.global_batch // runtime.world_size
    first = begin.samples_at(step, settings.global_batch) + runtime.rank * share
    return [tuple(range(at, at + micro)) for at in range(first, first + share, micro)]


def order_of(job: Job, begin: Position) -> Order:
    """Return the order of the samples of a run that begins or continues at ``begin``."""
    train = job.options.train
    return Order(buckets_of(job.data), train.seed, train.global_batch, begin.samples)


def loses_caption(number: int, seed: int, share: float) -> bool:
    """Whether sample ``number`` of the run is trained with the empty prompt."""
    return mix_seed(seed, DROPOUT_STREAM, number) < share * _SEEDS


def empty_prompt(data: Dataset, family: Family, field: str = "train.caption_dropout") -> Sample:
    """Return the family's prompt fields of the empty caption, which a config field asks for.

    Raises:
        ConfigError: the family has no prompts, or the data set no empty one.
    """
    names: Sequence[str] = getattr(family, "prompt_fields", ())
    if not names:
        raise ConfigError(
            f"Invalid {field}: model_type={family.model_type!r} has no captions; remove it."
        )
    find: Any = getattr(data, "empty_prompt", lambda: None)
    found: Mapping[str, Any] | None = find()
    missing = [name for name in names if found is None or name not in found]
    if found is None or missing:
        raise ConfigError(
            f"Invalid {field}: the data set holds no empty prompt"
            f" ({', '.join(missing)}); write it with `python launch/cache_latents.py --model ...`,"
            f" or remove {field}."
        )
    return {name: found[name] for name in names}


def check_empty_prompt(options: RunOptions, data: Dataset, family: Family) -> None:
    """Refuse caption dropout and guided samples where there is no empty prompt.

    Raises:
        ConfigError: see ``empty_prompt``.
    """
    if options.train.caption_dropout > 0:
        empty_prompt(data, family)
    if options.samples.guidance > 1:
        empty_prompt(data, family, "samples.guidance")
