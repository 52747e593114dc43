"""The training loop: the same for every family, dataset and engine."""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from dist_layerlr.errors import ConfigError
from launch.trainer.data.base import Dataset
from launch.trainer.engines.base import Engine
from launch.trainer.families.base import Family
from launch.trainer.metrics import MetricsFile, peak_memory_gb
from launch.trainer.objectives.flow import make_flow_batch, mix_seed
from launch.trainer.options import RunOptions, TrainOptions
from launch.trainer.runtime import Diverged, Runtime

Batch = dict[str, Tensor]
Save = Callable[[int, int, Mapping[str, float]], None]
"""(steps done, samples seen, rates observed at the first step) -> a checkpoint."""
LOWER = "Lower the learning rates, or set train.grad_clip."
_ORDER_STREAM = 3


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run begins or continues."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples seen."""
    observed: Mapping[str, float] = field(default_factory=dict)
    """``Outcome.observed`` of the first step, if it was before."""

    def samples_at(self, step: int, global_batch: int) -> int:
        """Samples seen before a step."""
        return self.samples + (step - self.step) * global_batch


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended."""

    steps: int
    """Optimizer steps done."""
    stopped: bool
    """Whether a signal ended it early."""
    last_factor: float
    """Schedule multiplier of the last step."""
    observed: Mapping[str, float]
    """{name: rate at which the first step moved it}; this rank's, where the update shows it."""


class StopFlag:
    """Set by SIGINT and SIGTERM; the step in progress is finished and saved first."""

    def __init__(self) -> None:
        self.raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        self.raised = True


@contextmanager
def catch_signals() -> Iterator[StopFlag]:
    """Turn SIGINT and SIGTERM into a flag inside the block, however many come.

    On Ctrl-C every rank gets two: one from the terminal, one from torchrun. SIGQUIT and SIGKILL end
    a run at once.
    """
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    engine: Engine,
    family: Family,
    data: Dataset,
    options: RunOptions,
    runtime: Runtime,
    metrics: MetricsFile | None,
    stop: StopFlag | None = None,
    begin: Position | None = None,
    save: Save | None = None,
) -> Outcome:
    """Train until ``options.train.steps`` optimizer steps are done, or until a signal. Collective.

    Args:
        engine: model and optimizer.
        family: how to call the model.
        data: samples, read by number.
        options: of the run.
        runtime: this rank.
        metrics: where rank 0 writes its rows; None elsewhere.
        stop: ends the run after the step in which any rank sees it raised.
        begin: where to continue; None: at the beginning.
        save: writes a checkpoint; called as train.save_every says, after the last step, and when
            stopped.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    # The norms' weights are float32 under bf16 autocast, so torch takes its unfused kernel: slower,
    # the same numbers.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    steps = options.train.steps
    begin = begin or Position()
    factor, stopped = 1.0, False
    observed = dict(begin.observed)
    with _progress(steps, begin.step, runtime) as show:
        for step in range(begin.step, steps):
            started = time.perf_counter()
            factor = options.schedule.factor(step)
            loss = _accumulate(engine, family, data, options, runtime, begin, step)
            loss, stopped = _share(loss, stop is not None and stop.raised, runtime)
            finite = math.isfinite(loss)
            # The first step is watched: it proves the effective rates, not only the reported ones.
            norm = (
                engine.step(factor, observed=observed if step == 0 else None)
                if finite
                else math.nan
            )
            row = {
                "step": step,
                "loss": loss,
                "lr_factor": factor,
                "grad_norm": norm,
                "s_per_step": time.perf_counter() - started,
                "peak_memory_gb": peak_memory_gb(runtime.device),
                **engine.traffic(),
            }
            if metrics is not None and (
                step % options.train.log_every == 0 or step == steps - 1 or stopped or not finite
            ):
                metrics.write(row)
            if not finite:
                raise Diverged(f"loss is {loss} at step {step}; nothing is saved. {LOWER}")
            show(row)
            if save is not None and _due(step + 1, options.train, stopped):
                save(step + 1, begin.samples_at(step + 1, options.train.global_batch), observed)
            if stopped:
                steps = step + 1
                break
    return Outcome(steps=steps, stopped=stopped, last_factor=factor, observed=observed)


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
    """Which sample of the dataset sample number ``number`` of the run is: a fresh permutation every
    epoch.
    """
    epoch, position = divmod(number, length)
    return int(_order(epoch, length, seed)[position])


@lru_cache(maxsize=2)
def _order(epoch: int, length: int, seed: int) -> Tensor:
    """The permutation of one epoch; a batch may straddle two."""
    generator = torch.Generator().manual_seed(mix_seed(seed, _ORDER_STREAM, epoch))
    return torch.randperm(length, generator=generator)


def stack_samples(data: Dataset, indices: list[int]) -> Batch:
    """Read and stack samples: ``latents`` (B, C, F, H, W), ``prompt_embeds`` (B, L, D)."""
    samples = [data[i] for i in indices]
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def _accumulate(
    engine: Engine,
    family: Family,
    data: Dataset,
    options: RunOptions,
    runtime: Runtime,
    begin: Position,
    step: int,
) -> float:
    """Forward and backward over this rank's share of the step's samples. Returns its mean loss."""
    micro = micro_batch_size(options, runtime.world_size)
    share = options.train.global_batch // runtime.world_size
    first = begin.samples_at(step, options.train.global_batch) + runtime.rank * share
    parts = share // micro
    total = 0.0
    for part in range(parts):
        numbers = list(range(first + part * micro, first + (part + 1) * micro))
        indices = [sample_index(n, len(data), options.train.seed) for n in numbers]
        read = runtime.agree(partial(stack_samples, data, indices))
        batch = {key: value.to(runtime.device) for key, value in read.items()}
        with engine.micro_step(last=part == parts - 1):
            loss = _loss(engine, family, batch, numbers, options) / parts
            engine.backward(loss)
        total += loss.item()
    return total


def _loss(
    engine: Engine, family: Family, batch: Batch, numbers: list[int], options: RunOptions
) -> Tensor:
    """Mean squared error of the velocity, in float32."""
    flow = make_flow_batch(batch["latents"], numbers, options.train.seed)
    device = flow.noisy.device.type
    with autocast(device, options):
        velocity = family.velocity(engine.model, flow.noisy, flow.timestep, batch)
    return torch.nn.functional.mse_loss(velocity.float(), flow.target)


def autocast(device: str, options: RunOptions) -> torch.autocast:
    """The context of every forward.

    While streaming nothing is cached: casts would keep all blocks on the device.
    """
    bf16 = options.train.dtype == "bf16"
    return torch.autocast(
        device, dtype=torch.bfloat16, enabled=bf16, cache_enabled=options.stream is None
    )


def _share(loss: float, stop: bool, runtime: Runtime) -> tuple[float, bool]:
    """Mean loss over ranks, and whether any rank was told to stop: one collective."""
    if runtime.world_size == 1:
        return loss, stop
    values = torch.tensor([loss, float(stop)], dtype=torch.float64, device=runtime.device)
    dist.all_reduce(values)
    return float(values[0]) / runtime.world_size, float(values[1]) > 0


Show = Callable[[dict[str, float]], None]


@contextmanager
def _progress(steps: int, done: int, runtime: Runtime) -> Iterator[Show]:
    """A progress bar on rank 0."""
    from tqdm import tqdm

    with tqdm(
        total=steps, initial=done, disable=not runtime.is_main, unit="step", dynamic_ncols=True
    ) as bar:

        def show(row: dict[str, float]) -> None:
            bar.set_postfix_str(
                f"loss {row['loss']:.4f}, {row['s_per_step']:.3f} s/step,"
                f" {row['peak_memory_gb']:.2f} GiB",
                refresh=False,
            )
            bar.update()

        yield show
