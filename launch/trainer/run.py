"""One run, from the plan to the exported weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dist_layerlr import plan_model
from dist_layerlr.files import write_json, write_text
from dist_layerlr.offload import Prediction
from dist_layerlr.plan import Plan
from dist_layerlr.ranks import alike
from dist_layerlr.report import grid
from dist_layerlr.sharders import unwrap
from dist_layerlr.weights import check_pretrained
from launch.trainer import outputs
from launch.trainer.data import check_dataset, open_dataset
from launch.trainer.engines import build_engine
from launch.trainer.families import get_family
from launch.trainer.job import Job
from launch.trainer.loop import micro_batch_size, train
from launch.trainer.metrics import MetricsFile
from launch.trainer.options import RunOptions
from launch.trainer.request import Request
from launch.trainer.resume import (
    adapt_plan,
    choose_checkpoint,
    finish_saving,
    is_own,
    restore,
    saver,
)
from launch.trainer.runtime import Diverged, Runtime
from launch.trainer.signals import StopFlag, catch_signals
from launch.trainer.state import Outcome, Position
from launch.trainer.weights import empty_model


def print_plan(options: RunOptions, runtime: Runtime) -> None:
    """Print the grid of learning rates. Collective."""
    _, plan = _planned(options)
    runtime.say(grid(plan))


def run(request: Request, options: RunOptions, runtime: Runtime) -> None:
    """Check everything, train, and write what the run leaves behind. Collective.

    Raises:
        LayerLRError: Bad input, on all ranks alike, before the first step where it can be seen.
        Diverged: Training ran into NaN or infinity.
    """
    # Cheap checks first, so that a typing error costs seconds and not the loading of a model.
    model, plan = _planned(options)
    alike(lambda: check_pretrained(model, options.model_path, fresh=True))
    family = get_family(options.model_type)
    data = alike(lambda: open_dataset(options.data))
    shape: Any = model.config
    alike(lambda: check_dataset(data, family, shape))
    alike(lambda: micro_batch_size(options, runtime.world_size))
    folder = alike(
        lambda: outputs.open_output_dir(
            request.output_dir, options.model_path, probe=runtime.is_main
        )
    )
    checkpoint = choose_checkpoint(request.resume, folder, runtime)
    if checkpoint is not None:
        plan = adapt_plan(checkpoint, plan, runtime)
    runtime.say(grid(plan))
    engine = build_engine(request.sharding, model, plan, options, runtime, request.deepspeed_config)
    job = Job(
        engine=engine,
        family=family,
        data=data,
        plan=plan,
        options=options,
        runtime=runtime,
        folder=folder,
    )
    # Until the weights are written: a second signal must not cut the saving short.
    with catch_signals() as stop:
        _train_and_save(job, stop, checkpoint)


def _planned(options: RunOptions) -> tuple[nn.Module, Plan]:
    """Build the model on the meta device, and its plan. Collective."""
    family = get_family(options.model_type)
    model = alike(lambda: empty_model(family, options))
    return model, alike(lambda: plan_model(model, options.plan))


def _train_and_save(job: Job, stop: StopFlag, checkpoint: Path | None) -> None:
    """Continue or begin, prove, train, prove again, and write the results. Collective."""
    runtime = job.runtime
    begin = Position() if checkpoint is None else restore(job, checkpoint)
    # After a checkpoint was loaded, which may have overwritten rates.
    proof = alike(lambda: job.engine.prove(1.0))
    runtime.say(proof.line())
    prediction = _predict(job)
    if prediction is not None:
        runtime.say(f"[stagehand] {prediction.line()}")
    metrics = None
    if runtime.is_main:
        metrics = _open_files(
            job, begin, kept=checkpoint is not None and is_own(checkpoint, job.folder)
        )
        if prediction is not None:
            metrics.write({"step": begin.step, "prediction": prediction.to_dict()})
    try:
        outcome = train(job, metrics, stop, begin, saver(job))
    except Diverged:
        # All ranks raise it. The last periodic checkpoint is good, so let it get onto the disk.
        finish_saving()
        raise
    finish_saving()
    # Again, because DeepSpeed, a scheduler or an optimizer may have changed rates on the way.
    after = alike(lambda: job.engine.prove(outcome.last_factor))
    weights = outputs.save_weights(job, outcome.steps)
    if runtime.is_main:
        seen = {"start": proof.to_dict(), "end": after.to_dict(), "first_step_lr": outcome.observed}
        write_json(job.folder / "verify.json", seen)
    _finish(job, outcome, weights)


def _open_files(job: Job, begin: Position, *, kept: bool) -> MetricsFile:
    """Write the plan and open metrics.jsonl; remove an earlier run's files unless ``kept``."""
    # Only now, when nothing can be refused any more: bad input must not cost the earlier results.
    if not kept:
        outputs.remove_previous_run(job.folder)
    write_text(job.folder / "plan.json", job.plan.to_json() + "\n")
    outputs.draw_plan(job.plan, job.folder)
    return MetricsFile(job.folder / "metrics.jsonl", first_step=begin.step)


def _predict(job: Job) -> Prediction | None:
    """Predict what a step will cost while streaming, going by the first sample."""
    model: Any = unwrap(job.engine.model)
    world_size = job.runtime.world_size
    micro = micro_batch_size(job.options, world_size)
    micro_steps = job.options.train.global_batch // world_size // micro
    # The first sample that is read at all: if it is damaged on one rank, all must hear of it.
    first = alike(lambda: job.data[0])
    tokens = micro * job.family.tokens(model.config, first)
    return job.engine.predict(tokens, micro_steps, job.options)


def _finish(job: Job, outcome: Outcome, weights: Path) -> None:
    """Draw the samples unless a signal hurries, and say where everything is. Collective."""
    picture = None if outcome.stopped else outputs.draw_generated(job)
    ended = "stopped by a signal after" if outcome.stopped else "finished"
    job.runtime.say(f"{ended} {outcome.steps} steps; weights in {weights}")
    if picture is not None:
        job.runtime.say(f"learning rates in {job.folder / 'lr_grid.png'}, samples in {picture}")
