"""The training loop: the same for every family, objective, dataset and engine."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_layerlr.ranks import alike, any_rank
from launch.trainer.batches import Batches, microbatches
from launch.trainer.engines.base import autocast
from launch.trainer.job import Job
from launch.trainer.metrics import MetricsFile, peak_memory_gb
from launch.trainer.options import RunOptions, TrainOptions
from launch.trainer.progress import progress
from launch.trainer.runtime import LOWER, Diverged, Runtime
from launch.trainer.seeds import MODEL_STREAM, mix_seed
from launch.trainer.signals import StopFlag
from launch.trainer.state import Outcome, Position
from launch.trainer.steering import Orders
from launch.trainer.team import Team, alone, under
from launch.trainer.validation import Validation
from launch.trainer.watch import Cells, Pace

Save = Callable[[int, int, Mapping[str, float], Mapping[str, Any]], None]
"""(steps done, samples seen, rates observed at the first step, ``Validation.state``) -> a
checkpoint."""
Draw = Callable[[int], object]
"""Steps done -> a picture."""


def train(
    run: Job | Team,
    metrics: MetricsFile | None,
    stop: StopFlag | None = None,
    begin: Position | None = None,
    save: Save | None = None,
    draw: Draw | None = None,
) -> Outcome:
    """Train until ``train.steps`` steps are done, an early stop or a signal. Collective.

    Args:
        run: What is trained, and on what.
        metrics: Where rank 0 writes its rows; None elsewhere.
        stop: Ends the run as soon as any rank sees it raised: after the microbatch at hand. A step
            whose last microbatch that was is done first, any other is dropped.
        begin: Where to continue; None: at the beginning.
        save: Writes a checkpoint. Called as train.save_every says, after the last step, and when
            stopped.
        draw: Draws what the model makes. Called as samples.every says, but not after the last step.

    Raises:
        Diverged: The loss is NaN or infinite.
    """
    _hush()
    team = alone(run) if isinstance(run, Job) else run
    job, settings = team.face, team.face.options.train
    begin = begin or Position()
    batches = Batches(job, begin)
    factor, done, saved = 1.0, begin.step, begin.step
    # The signal may have come while the model was loaded.
    stopped = team.steering.begin(team, done) or _told(stop)
    held = Validation(team, begin.validation)
    watch = _Watched(dict(begin.observed), Cells(team), Pace(settings), held)
    with batches, progress(settings, begin.step, job.runtime) as show:
        while done < settings.steps and not stopped and not held.enough:
            row, stopped = _step(team, done, batches, watch, stop)
            if row is None:
                break
            factor = row["lr_factor"]
            _note(metrics, row, settings, stopped=stopped)
            show(row)
            done += 1
            orders = Orders() if stopped else team.steering.take(team, done)
            # Also where an order ends the run: this is then its last reading.
            stopped = stopped or _read_held_out(held, done, metrics, stop) or orders.end
            # After the row: what is in the checkpoint is then in metrics.jsonl too.
            if save is not None and not stopped and (orders.save or _due(done, settings)):
                saved = _keep(save, begin, done, settings, watch)
                # Saving may take longer than a step, and a launcher's patience runs.
                stopped = _told(stop)
            if draw is not None and not stopped and (orders.sample or _draws(done, job.options)):
                draw(done)
                stopped = _told(stop)
        if save is not None and saved < done and (stopped or held.ends):
            _keep(save, begin, done, settings, watch)
    return Outcome(
        steps=done, stopped=stopped, enough=held.enough, last_factor=factor, observed=watch.observed
    )


def _hush() -> None:
    # The norms' weights are float32 under bf16 autocast, so torch takes its unfused kernel: slower,
    # the same numbers.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")


def _read_held_out(
    held: Validation, done: int, metrics: MetricsFile | None, stop: StopFlag | None
) -> bool:
    """Read the validation loss where it is due. Returns whether any rank was told to stop."""
    for row in held.rows(done, stop):
        write_row(metrics, row)
    return _told(stop)


@dataclass(frozen=True)
class _Watched:
    """What steps are watched with."""

    observed: dict[str, float]
    """Filled with the rates of a network's first step."""
    cells: Cells
    pace: Pace
    held: Validation


def _step(
    team: Team, step: int, batches: Batches, watch: _Watched, stop: StopFlag | None
) -> tuple[dict[str, Any] | None, bool]:
    """Do one optimizer step. Returns its row of metrics, and whether any rank was told to stop.

    If the loss is not finite, weights stay as they are. There is no row where a stop came between
    two microbatches: the weights are then those of the step before, and can be saved at once.
    """
    started, name, job = time.perf_counter(), team.turns.at(step), team.at(step)
    factor = team.steering.factor(step)
    # What a timing holds at this step has no gradient, so it comes before the backward passes.
    job.engine.begin(factor, step)
    loss = _accumulate(job, batches, step, stop)
    if loss is None:
        return None, True
    # Every rank now holds the same loss and flag, so all of them take the same branches below.
    told = float(stop is not None and stop.raised)
    asked = float(team.steering.waiting(step + 1))
    counted = [told, asked, *batches.counted()]
    total, told, asked, tokens, waited = _add_up(loss, counted, job.runtime)
    team.steering.told = asked > 0
    ranks = job.runtime.world_size
    mean, stopped, norm, reading = total / ranks, told > 0, math.nan, None
    if math.isfinite(mean):
        # The first step of a network is watched: it proves the effective rates, not only the
        # reported ones.
        watched = team.turns.is_first(step) and job.options.optimizer.observable
        first: dict[str, float] | None = {} if watched else None
        watch.cells.before(name, job, step)
        norm = job.engine.step(factor, observed=first)
        if job.ema is not None:
            job.ema.after(team.turns.count(name, step + 1))
        reading = watch.cells.after(name)
        watch.observed.update(under(name, first or {}))
    row = {
        "step": step,
        **({"network": name} if name else {}),
        "loss": mean,
        "lr_factor": factor,
        "grad_norm": norm,
        **watch.pace.row(step, time.perf_counter() - started, tokens, waited / ranks),
        "peak_memory_gb": peak_memory_gb(job.runtime.device),
        **job.engine.traffic(),
        **({"cells": reading} if reading is not None else {}),
    }
    return row, stopped


def _note(
    metrics: MetricsFile | None, row: dict[str, Any], train: TrainOptions, *, stopped: bool
) -> None:
    """Write a row where it is due, and end the run where its loss is no number. Collective."""
    step, finite = row["step"], math.isfinite(row["loss"])
    if stopped or not finite or "cells" in row or _logs(step, train):
        write_row(metrics, row)
    if not finite:
        raise Diverged(f"loss is {row['loss']} at step {step}; nothing is saved. {LOWER}")


def _keep(save: Save, begin: Position, done: int, train: TrainOptions, watch: _Watched) -> int:
    """Write a checkpoint of ``done`` steps. Returns them."""
    save(done, begin.samples_at(done, train.global_batch), watch.observed, watch.held.state)
    return done


def _told(stop: StopFlag | None) -> bool:
    """Whether any rank was told to stop. Collective."""
    return any_rank(stop is not None and stop.raised)


def write_row(metrics: MetricsFile | None, row: dict[str, Any]) -> None:
    """Write a row on rank 0. Collective: all ranks end with it where the disk is full."""
    alike(lambda: None if metrics is None else metrics.write(row))


def _draws(done: int, options: RunOptions) -> bool:
    """Whether a picture is due after ``done`` steps; the last one is drawn when all is saved."""
    every = options.samples.every
    return every is not None and done % every == 0 and done < options.train.steps


def _logs(step: int, train: TrainOptions) -> bool:
    """Whether a step's row is to be written."""
    return step % train.rows_every == 0 or step == train.steps - 1


def _due(done: int, train: TrainOptions) -> bool:
    """Whether a periodic checkpoint is due after ``done`` steps."""
    return train.save_every is not None and (done % train.save_every == 0 or done == train.steps)


def _accumulate(job: Job, batches: Batches, step: int, stop: StopFlag | None) -> Tensor | None:
    """Forward and backward over this rank's share of the step's samples.

    Returns:
        Its mean loss, on the device, which may still be at work on it; None where a stop came
        before the last microbatch.
    """
    settings, runtime = job.options.train, job.runtime
    parts = microbatches(job.options, runtime, batches.begin, step)
    # float64, so that the sum is the same however many microbatches there are.
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for part, numbers in enumerate(parts):
        # A step of a large model takes longer than launchers wait before they kill.
        if part > 0 and _told(stop):
            return None
        batch = batches.read(numbers)
        # For what the model itself draws, dropout: neither rank nor resume decides it.
        torch.manual_seed(mix_seed(settings.seed, MODEL_STREAM, numbers[0]))
        with job.engine.micro_step(last=part == len(parts) - 1):
            with autocast(runtime.device, job.options):
                loss = job.objective.loss(job.engine.model, batch, numbers, settings.seed)
            # Outside autocast: backward runs in the dtypes that forward chose.
            mean = loss / len(parts)
            job.engine.backward(mean)
        # Not read: the host would wait for the device in each microbatch, and have nothing ready.
        total += mean.detach()
    return total


def _add_up(loss: Tensor, values: list[float], runtime: Runtime) -> list[float]:
    """The sums over ranks of a few numbers, the loss first: one collective.

    The only place of a step where the host reads a loss: one that is not finite must not be stepped
    with.
    """
    # float64, so that one rank's loss is the same number after the way through the tensor.
    table = torch.tensor([0.0, *values], dtype=torch.float64, device=runtime.device)
    table[0] = loss
    if runtime.world_size > 1:
        dist.all_reduce(table)
    return table.tolist()
