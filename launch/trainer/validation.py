"""The loss of samples that are held out, and whether it still falls.

A reading is a function of the weights alone: every sample is seen with noise that its own name
decides, at fixed levels, in batches that no number of ranks changes. So readings of one run, and of
several, compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.ranks import alike, any_rank
from dist_layerlr.sharders import sharder_of
from launch.trainer.data.base import Batch, Dataset, to_device
from launch.trainer.data.held import digest_of, key_of
from launch.trainer.data.order import buckets_of
from launch.trainer.ema import averaged
from launch.trainer.engines.base import autocast
from launch.trainer.job import Job
from launch.trainer.objectives import HasLevels, Objective
from launch.trainer.seeds import VALIDATION_STREAM, mix_seed
from launch.trainer.signals import StopFlag
from launch.trainer.team import Team
from launch.trainer.validation_options import ValidationOptions, level_name

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where ``validation.levels`` does not say."""
LOSS = "val_loss"
"""Key of the mean over all levels; ``val_loss/0.1`` is that of one level."""
_SEED = mix_seed(VALIDATION_STREAM)
"""Not the run's: readings of runs with different seeds compare."""


def check_levels(options: ValidationOptions, objective: Objective) -> None:
    """Refuse levels where there is no noise.

    Raises:
        ConfigError: names the field.
    """
    if options.levels is not None and not isinstance(objective, HasLevels):
        raise ConfigError(
            f"Invalid validation.levels={list(options.levels)}: this family is trained without"
            " noise; remove it."
        )


class Validation:
    """Reads the validation loss of a run when it is due. All calls are collective."""

    def __init__(self, team: Team, state: Mapping[str, Any]) -> None:
        """Bind to a run.

        Args:
            team: What is trained.
            state: ``state`` of the process before; empty at the beginning.
        """
        job = team.face
        self._team, self._runtime = team, job.runtime
        self._train, self._options = job.options.train, job.options.validation
        self._best: float | None = state.get("best")
        self._worse = int(state.get("worse", 0))
        self._held = job.held
        self._batches: list[list[int]] = []
        if job.held is not None:
            size = self._options.batch or self._train.micro_batch or 1
            self._batches = _batches(job.held, size)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"best": self._best, "worse": self._worse}

    @property
    def enough(self) -> bool:
        """Whether the run is to end, as ``train.early_stop`` says."""
        early = self._train.early_stop
        return early is not None and self._worse >= early.patience

    @property
    def ends(self) -> bool:
        """Whether the run ends with a checkpoint that no other condition asks for."""
        return self.enough and self._train.save_every is not None

    def rows(self, done: int, stop: StopFlag | None) -> list[dict[str, Any]]:
        """Return a row of metrics for each network, where a reading is due after ``done`` steps.

        None where a signal came in between: there may be no time for it.
        """
        due = done % self._options.every == 0 or done == self._train.steps
        if self._held is None or not due:
            return []
        rows: list[dict[str, Any]] = []
        for name, job in self._team.each():
            found = self._read(job, self._held, stop)
            if found is None:
                return []
            rows.append({"step": done - 1, **({"network": name} if name else {}), **found})
        self._judge(rows)
        self._say(done, rows)
        return rows

    def _judge(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Compare with the best reading. All ranks hold the same numbers, so they agree."""
        early = self._train.early_stop
        mean = sum(row[LOSS] for row in rows) / len(rows)
        # NaN is never better.
        least = 0.0 if early is None else early.min_delta
        better = math.isfinite(mean) if self._best is None else mean < self._best - least
        self._best, self._worse = (mean, 0) if better else (self._best, self._worse + 1)

    def _say(self, done: int, rows: Sequence[Mapping[str, Any]]) -> None:
        held = len(self._held or ())
        for row in rows:
            levels = [f"{key.partition('/')[2]}: {row[key]:.4f}" for key in row if "/" in key]
            shown = f" ({', '.join(levels)})" if levels else ""
            network = f" of {row['network']}" if "network" in row else ""
            self._runtime.say(
                f"step {done} of {self._train.steps}: validation loss{network} {row[LOSS]:.4f}"
                f"{shown}, {held} samples held out"
            )
        if self.enough:
            # There is no best one where no reading was a number.
            than = "no number" if self._best is None else f"no better than {self._best:.4f}"
            self._runtime.say(f"train.early_stop: {self._worse} readings are {than}")

    def _read(self, job: Job, held: Dataset, stop: StopFlag | None) -> dict[str, float] | None:
        """Return the loss of one network, by key of the metrics; None if a stop came."""
        runtime, device, batches = job.runtime, job.runtime.device, self._batches
        asked = _objectives(job.objective, self._options)
        # A criterion that counts over ranks needs the same batch on all of them.
        ranks = 1 if getattr(job.objective, "counts_over_ranks", False) else runtime.world_size
        place = runtime.rank if ranks > 1 else 0
        losses = torch.zeros(len(asked), len(batches), dtype=torch.float64, device=device)
        with averaged([job]), _quiet(job):
            for first in range(0, len(batches), ranks):
                if first > 0 and any_rank(stop is not None and stop.raised):
                    return None
                # A rank for which there is none left goes through the last one with the others:
                # sharded weights are gathered by all ranks.
                mine = min(first + place, len(batches) - 1)
                indices = batches[mine]
                batch: Batch = alike(partial(_collated, job, held, indices))
                batch = to_device(batch, device)
                numbers = [digest_of(key_of(held, index)) for index in indices]
                torch.manual_seed(mix_seed(_SEED, mine))
                for row, (_, objective) in enumerate(asked):
                    with autocast(device, job.options):
                        loss = objective.loss(job.engine.model, batch, numbers, _SEED)
                    if first + place == mine and (ranks > 1 or runtime.is_main):
                        losses[row, mine] = loss.double() * len(indices)
        return _means(losses, [key for key, _ in asked], len(held), runtime.world_size)


def _means(losses: Tensor, keys: Sequence[str], count: int, ranks: int) -> dict[str, float]:
    """Add up the losses of batches, each of which one rank has put in."""
    if ranks > 1:
        # Beside a number there are only zeros, so the sum is exact, and the one below has an order.
        dist.all_reduce(losses)
    each = [math.fsum(row) / count for row in losses.tolist()]
    found = {LOSS: math.fsum(each) / len(each)}
    return found if keys == [LOSS] else found | dict(zip(keys, each, strict=True))


def _objectives(objective: Objective, options: ValidationOptions) -> list[tuple[str, Objective]]:
    """What a sample is asked, by key of the metrics."""
    if not isinstance(objective, HasLevels):
        return [(LOSS, objective)]
    levels = options.levels or LEVELS
    return [(f"{LOSS}/{level_name(level)}", objective.at_level(level)) for level in levels]


def _batches(held: Dataset, size: int) -> list[list[int]]:
    """Numbers of the samples of each forward: a function of the data set alone."""
    found: list[list[int]] = []
    for members in buckets_of(held):
        found += [list(members[i : i + size]) for i in range(0, len(members), size)]
    return found


def _collated(job: Job, held: Dataset, indices: Sequence[int]) -> Batch:
    return job.family.collate([held[index] for index in indices])


@contextmanager
def _quiet(job: Job) -> Iterator[None]:
    """Leave no trace in training: modes, random numbers, and what a sharder has gathered."""
    device, model = job.runtime.device, job.engine.model
    # A criterion may be a module that behaves otherwise in training, as its model does.
    parts = [model, *(one for one in vars(job.objective).values() if isinstance(one, nn.Module))]
    modes = [one.training for one in parts]
    for one in parts:
        one.eval()
    cards = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=cards):
            yield
    finally:
        for one, mode in zip(parts, modes, strict=True):
            one.train(mode)
        # A forward without a backward leaves gathered weights in the place of those that train.
        sharder_of(model).reshard()
