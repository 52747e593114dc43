"""One run, from the plan to the exported weights."""

from __future__ import annotations

import uuid
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dist_layerlr import plan_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.files import write_text
from dist_layerlr.offload import Prediction
from dist_layerlr.plan import Plan
from dist_layerlr.proof import Proof
from dist_layerlr.ranks import alike, rank_zero
from dist_layerlr.report import grid
from dist_layerlr.sharders import unwrap
from dist_layerlr.weights import check_pretrained
from launch.trainer import outputs
from launch.trainer.batches import check_dropout, order_of
from launch.trainer.data import fit_dataset, open_dataset
from launch.trainer.engines import build_engine
from launch.trainer.estimate import check_cards, estimate
from launch.trainer.families import get_family
from launch.trainer.families.base import live_config
from launch.trainer.job import Job
from launch.trainer.loop import micro_batch_size, train, write_row
from launch.trainer.metrics import MetricsFile
from launch.trainer.objectives import Noted
from launch.trainer.options import RunOptions
from launch.trainer.record import write_record
from launch.trainer.request import Request
from launch.trainer.resume import (
    Saver,
    adapt_plan,
    choose_checkpoint,
    is_own,
    look_back,
    restore,
)
from launch.trainer.runlog import LOG
from launch.trainer.runtime import Diverged, Runtime
from launch.trainer.signals import StopFlag, catch_signals
from launch.trainer.state import Outcome, Position
from launch.trainer.weights import (
    empty_model,
    fresh_line,
    fresh_weights,
    frozen_line,
    spare_from_decay,
    spared_line,
)


def print_plan(options: RunOptions, runtime: Runtime) -> None:
    """Print the grid of learning rates. Collective."""
    _, plan = _planned(options)
    runtime.say(grid(plan))


def print_estimate(options: RunOptions, runtime: Runtime, cards: int, card_gb: float) -> None:
    """Print the memory of a run under each sharder. Collective."""
    check_cards(cards, card_gb)
    _, plan = _planned(options)
    runtime.say(alike(lambda: estimate(options, plan, cards, card_gb)).table())


def run(request: Request, options: RunOptions, runtime: Runtime) -> None:
    """Check everything, train, and write what the run leaves behind. Collective.

    Raises:
        LayerLRError: Bad input, on all ranks alike, before the first step where it can be seen.
        Diverged: Training ran into NaN or infinity.
    """
    # Cheap checks first, so that a typing error costs seconds and not the loading of a model.
    model, plan = _planned(options)
    anew = alike(lambda: fresh_weights(options))
    alike(lambda: check_pretrained(model, options.model_path, fresh=True, anew=anew))
    family = get_family(options.model_type, options.objective)
    objective = alike(lambda: family.objective(options.objective, Path(options.model_path)))
    data = alike(lambda: open_dataset(options.data))
    alike(lambda: fit_dataset(data, family, live_config(model)))
    alike(lambda: check_dropout(options.train.caption_dropout, data, family))
    alike(lambda: micro_batch_size(options, runtime.world_size))
    folder = alike(
        lambda: outputs.open_output_dir(
            request.output_dir, options.model_path, probe=runtime.is_main, say=runtime.say
        )
    )
    checkpoint = choose_checkpoint(request.resume, folder, runtime)
    run_id = rank_zero(lambda: uuid.uuid4().hex[:16])
    if checkpoint is not None:
        past = look_back(checkpoint)
        trained = past.step == options.train.steps
        if trained and rank_zero(lambda: outputs.holds_result(folder, past.run_id, past.step)):
            runtime.say(
                f"nothing to train: {checkpoint} is after {past.step} of {past.step} steps;"
                f" {folder / outputs.FINAL}, plan.json and verify.json stay as that run left them"
            )
            return
        # What is left to write is the result of the start that trained.
        run_id = past.run_id or run_id if trained else run_id
        plan = adapt_plan(checkpoint, plan, runtime, trained=trained)
    runtime.say(grid(plan))
    note = objective.note if isinstance(objective, Noted) else None
    spared, new = spared_line(family, model, plan), fresh_line(options)
    for line in (frozen_line(family, model, options), spared, new, note):
        if line is not None:
            runtime.say(line)
    engine = build_engine(request.sharding, model, plan, options, runtime, request.deepspeed_config)
    job = Job(
        engine=engine,
        family=family,
        objective=objective,
        data=data,
        plan=plan,
        options=options,
        runtime=runtime,
        folder=folder,
        run_id=run_id,
    )
    # Until the weights are written: a second signal must not cut the saving short.
    with catch_signals() as stop:
        _train_and_save(job, stop, checkpoint)


def _planned(options: RunOptions) -> tuple[nn.Module, Plan]:
    """Build the model on the meta device, and its plan. Collective."""
    family = get_family(options.model_type, options.objective)
    model = alike(lambda: empty_model(family, options))
    return model, alike(lambda: spare_from_decay(family, model, plan_model(model, options.plan)))


def _train_and_save(job: Job, stop: StopFlag, checkpoint: Path | None) -> None:
    """Continue or begin, prove, train, prove again, and write the results. Collective."""
    runtime = job.runtime
    begin = Position() if checkpoint is None else restore(job, checkpoint)
    # After a checkpoint was loaded, which may have overwritten rates.
    proof = alike(lambda: job.engine.prove(1.0, begin.step))
    runtime.say(proof.line())
    prediction = _predict(job)
    if prediction is not None:
        runtime.say(f"[stagehand] {prediction.line()}")
    runtime.say(_sizes(job, begin))
    kept = checkpoint is not None and is_own(checkpoint, job.folder)
    # All ranks, though one writes: they end together where its disk is full.
    metrics = alike(lambda: _open_files(job, begin, proof, kept=kept) if runtime.is_main else None)
    if prediction is not None:
        write_row(metrics, {"step": begin.step, "prediction": prediction.to_dict()})
    save = Saver(job)
    try:
        outcome = train(job, metrics, stop, begin, save, partial(outputs.draw_generated, job))
    except Diverged:
        # All ranks raise it. The last periodic checkpoint is good, so let it get onto the disk.
        save.finish()
        raise
    save.finish()
    if outcome.stopped and outcome.steps == begin.step < job.options.train.steps:
        runtime.say(f"stopped by a signal before step {begin.step + 1}; nothing new to save")
        return
    # Again, because DeepSpeed, a scheduler or an optimizer may have changed rates on the way.
    after = alike(lambda: job.engine.prove(outcome.last_factor, outcome.steps))
    seen = {"start": proof.to_dict(), "end": after.to_dict(), "first_step_lr": outcome.observed}
    weights = outputs.save_result(job, outcome.steps, seen)
    _finish(job, outcome, weights)


def _open_files(job: Job, begin: Position, proof: Proof, *, kept: bool) -> MetricsFile:
    """Begin the files of this run; go on with those that are there where ``kept``."""
    # Only now, when nothing can be refused any more: bad input must not cost the earlier results.
    try:
        if not kept:
            outputs.remove_previous_run(job.folder)
        write_text(job.folder / outputs.PLAN, job.plan.to_json() + "\n")
        outputs.draw_plan(job.plan, job.folder)
        # Where no step is left, this process's config is not what was trained.
        if begin.step < job.options.train.steps:
            write_record(job, begin, sharder=proof.sharder, kept=kept)
        job.runtime.log.open(job.folder / LOG, kept=kept)
        return MetricsFile(job.folder / outputs.METRICS, first_step=begin.step)
    except OSError as error:
        raise ConfigError(
            f"Cannot write {str(error.filename)!r}: {error.strerror}. Make room, or choose another"
            " --output-dir."
        ) from None


def _sizes(job: Job, begin: Position) -> str:
    """What is trained on what, in one line."""
    runtime, train = job.runtime, job.options.train
    micro = micro_batch_size(job.options, runtime.world_size)
    parts = train.global_batch // runtime.world_size // micro
    if begin.step == train.steps:
        return f"no step is left of {train.steps}: only the result is to be written"
    ranks = f"{runtime.world_size} rank" + "s" * (runtime.world_size > 1)
    return (
        f"training on {ranks}, device {runtime.device.type}: {_samples(job, begin)}, global batch"
        f" {train.global_batch} (each rank {parts} x {micro}), steps {begin.step + 1} to"
        f" {train.steps}"
    )


def _samples(job: Job, begin: Position) -> str:
    """How many there are, and of how many sizes."""
    order, text = order_of(job, begin), f"{len(job.data)} samples"
    if order.buckets == 1:
        return text
    return f"{text} in {order.buckets} buckets ({order.filled} seen again an epoch to fill batches)"


def _predict(job: Job) -> Prediction | None:
    """Predict what a step will cost while streaming, going by the first sample."""
    model: Any = unwrap(job.engine.model)
    world_size = job.runtime.world_size
    micro = micro_batch_size(job.options, world_size)
    micro_steps = job.options.train.global_batch // world_size // micro
    # The first sample that is read at all: if it is damaged on one rank, all must hear of it.
    first = alike(lambda: job.data[0])
    tokens = micro * job.family.tokens(live_config(model), first)
    return job.engine.predict(tokens, micro_steps, job.options)


def _finish(job: Job, outcome: Outcome, weights: Path) -> None:
    """Draw the samples unless a signal hurries, and say where everything is. Collective."""
    picture = None if outcome.stopped else outputs.draw_generated(job)
    ended = "stopped by a signal after" if outcome.stopped else "finished"
    job.runtime.say(f"{ended} {outcome.steps} steps; weights in {weights}")
    if picture is not None:
        job.runtime.say(f"learning rates in {job.folder / 'lr_grid.png'}, samples in {picture}")
