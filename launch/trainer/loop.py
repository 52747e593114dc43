"""The training loop: the same for every family, objective, dataset and engine."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_layerlr.errors import ConfigError
from dist_layerlr.ranks import alike
from launch.trainer.data.base import Batch, to_device
from launch.trainer.engines.base import autocast
from launch.trainer.job import Job
from launch.trainer.metrics import MetricsFile, peak_memory_gb
from launch.trainer.options import RunOptions, TrainOptions
from launch.trainer.runtime import LOWER, Diverged, Runtime
from launch.trainer.seeds import ORDER_STREAM, mix_seed
from launch.trainer.signals import StopFlag
from launch.trainer.state import Outcome, Position

Save = Callable[[int, int, Mapping[str, float]], None]
"""(steps done, samples seen, rates observed at the first step) -> a checkpoint."""


def train(
    job: Job,
    metrics: MetricsFile | None,
    stop: StopFlag | None = None,
    begin: Position | None = None,
    save: Save | None = None,
) -> Outcome:
    """Train until ``train.steps`` optimizer steps are done, or until a signal. Collective.

    Args:
        job: What is trained, and on what.
        metrics: Where rank 0 writes its rows; None elsewhere.
        stop: Ends the run after the step in which any rank sees it raised.
        begin: Where to continue; None: at the beginning.
        save: Writes a checkpoint. Called as train.save_every says, after the last step, and when
            stopped.

    Raises:
        Diverged: The loss is NaN or infinite.
    """
    # The norms' weights are float32 under bf16 autocast, so torch takes its unfused kernel: slower,
    # the same numbers.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    settings = job.options.train
    begin = begin or Position()
    factor, stopped, done = 1.0, False, begin.step
    observed = dict(begin.observed)
    with _progress(settings.steps, begin.step, job.runtime) as show:
        while done < settings.steps and not stopped:
            factor = job.options.schedule.factor(done)
            row, stopped = _step(job, done, begin, observed, stop)
            finite = math.isfinite(row["loss"])
            logged = done % settings.log_every == 0 or done == settings.steps - 1
            if metrics is not None and (logged or stopped or not finite):
                metrics.write(row)
            if not finite:
                raise Diverged(f"loss is {row['loss']} at step {done}; nothing is saved. {LOWER}")
            show(row)
            done += 1
            # After the row: what is in the checkpoint is then in metrics.jsonl too.
            if save is not None and _due(done, settings, stopped):
                save(done, begin.samples_at(done, settings.global_batch), observed)
    return Outcome(steps=done, stopped=stopped, last_factor=factor, observed=observed)


def _step(
    job: Job, step: int, begin: Position, observed: dict[str, float], stop: StopFlag | None
) -> tuple[dict[str, Any], bool]:
    """Do one optimizer step. Returns its row of metrics, and whether any rank was told to stop.

    If the loss is not finite, weights stay as they are.
    """
    started = time.perf_counter()
    factor = job.options.schedule.factor(step)
    loss = _accumulate(job, begin, step)
    # Every rank now holds the same loss and flag, so all of them take the same branches below.
    loss, stopped = _share(loss, stop is not None and stop.raised, job.runtime)
    norm = math.nan
    if math.isfinite(loss):
        # The first step is watched: it proves the effective rates, not only the reported ones.
        norm = job.engine.step(factor, observed=observed if step == 0 else None)
    row = {
        "step": step,
        "loss": loss,
        "lr_factor": factor,
        "grad_norm": norm,
        "s_per_step": time.perf_counter() - started,
        "peak_memory_gb": peak_memory_gb(job.runtime.device),
        **job.engine.traffic(),
    }
    return row, stopped


def _due(done: int, train: TrainOptions, stopped: bool) -> bool:
    """Whether a checkpoint is due after ``done`` steps."""
    periodic = train.save_every is not None and (
        done % train.save_every == 0 or done == train.steps
    )
    return stopped or periodic


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


def sample_index(number: int, length: int, seed: int) -> int:
    """Index in the dataset of sample ``number`` of the run: a fresh permutation every epoch."""
    epoch, position = divmod(number, length)
    return int(_order(epoch, length, seed)[position])


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _order(epoch: int, length: int, seed: int) -> Tensor:
    """Return the permutation of one epoch."""
    generator = torch.Generator().manual_seed(mix_seed(seed, ORDER_STREAM, epoch))
    return torch.randperm(length, generator=generator)


def _accumulate(job: Job, begin: Position, step: int) -> float:
    """Forward and backward over this rank's share of the step's samples. Returns its mean loss."""
    settings, runtime = job.options.train, job.runtime
    micro = micro_batch_size(job.options, runtime.world_size)
    share = settings.global_batch // runtime.world_size
    first = begin.samples_at(step, settings.global_batch) + runtime.rank * share
    parts = share // micro
    total = 0.0
    for part in range(parts):
        numbers = list(range(first + part * micro, first + (part + 1) * micro))
        batch = _read(job, numbers)
        with job.engine.micro_step(last=part == parts - 1):
            with autocast(runtime.device, job.options):
                loss = job.family.objective.loss(job.engine.model, batch, numbers, settings.seed)
            # Outside autocast: backward runs in the dtypes that forward chose.
            mean = loss / parts
            job.engine.backward(mean)
        total += mean.item()
    return total


def _read(job: Job, numbers: list[int]) -> Batch:
    """Read the samples with these numbers. Collective: ranks fail together on a broken sample."""

    def collate() -> Batch:
        seed, length = job.options.train.seed, len(job.data)
        return job.family.collate([job.data[sample_index(n, length, seed)] for n in numbers])

    batch: Batch = to_device(alike(collate), job.runtime.device)
    return batch


def _share(loss: float, stop: bool, runtime: Runtime) -> tuple[float, bool]:
    """Mean loss over ranks, and whether any rank was told to stop: one collective."""
    if runtime.world_size == 1:
        return loss, stop
    # float64, so that one rank's loss is the same number after the way through the tensor.
    values = torch.tensor([loss, float(stop)], dtype=torch.float64, device=runtime.device)
    dist.all_reduce(values)
    return float(values[0]) / runtime.world_size, float(values[1]) > 0


Show = Callable[[dict[str, Any]], None]


@contextmanager
def _progress(steps: int, done: int, runtime: Runtime) -> Iterator[Show]:
    """Show a progress bar on rank 0."""
    from tqdm import tqdm

    with tqdm(
        total=steps, initial=done, disable=not runtime.is_main, unit="step", dynamic_ncols=True
    ) as bar:

        def show(row: dict[str, Any]) -> None:
            # update() below draws the bar, at most ten times a second.
            bar.set_postfix_str(
                f"loss {row['loss']:.4f}, {row['s_per_step']:.3f} s/step,"
                f" {row['peak_memory_gb']:.2f} GiB",
                refresh=False,
            )
            bar.update()

        yield show
