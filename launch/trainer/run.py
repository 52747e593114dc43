"""One run, from the plan to the exported weights."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from launch.trainer.batches import check_empty_prompt, micro_batch_size, order_of
from launch.trainer.data import fit_dataset, open_dataset
from launch.trainer.data.base import Dataset
from launch.trainer.data.held import split
from launch.trainer.ema import averaged, ema_of
from launch.trainer.engines import build_engine
from launch.trainer.engines.base import Engine
from launch.trainer.epochs import steps_of, with_steps
from launch.trainer.estimate import check_cards, estimate
from launch.trainer.families import get_family
from launch.trainer.families.base import Family, live_config
from launch.trainer.job import Job
from launch.trainer.loop import train, write_row
from launch.trainer.metrics import MetricsFile
from launch.trainer.objectives import Noted, Objective
from launch.trainer.options import RunOptions, resolved
from launch.trainer.record import previous_config, write_record
from launch.trainer.request import Request
from launch.trainer.resume import (
    Past,
    Savers,
    adapt_plan,
    choose_checkpoints,
    is_own,
    look_back,
    restore_all,
)
from launch.trainer.runlog import LOG
from launch.trainer.runtime import Diverged, Runtime
from launch.trainer.signals import StopFlag, catch_signals
from launch.trainer.state import Outcome, Position
from launch.trainer.steering import Kept, Steering, resteered
from launch.trainer.team import Team, check_team, options_of_each, own, team_of
from launch.trainer.trackers import Trackers, check_trackers
from launch.trainer.validation import check_levels
from launch.trainer.weights import (
    empty_model,
    fresh_line,
    fresh_weights,
    frozen_line,
    spare_from_decay,
    spared_line,
)


def print_plan(options: RunOptions, runtime: Runtime, form: str) -> None:
    """Print the grid of learning rates of each network. Collective."""
    for name, one in options_of_each(options).items():
        if name:
            runtime.say(f"{name}:")
        runtime.say(grid(_planned(one)[1], form))


def print_estimate(options: RunOptions, runtime: Runtime, cards: int, card_gb: float) -> None:
    """Print the memory of a run under each sharder. Collective."""
    check_cards(cards, card_gb)
    _, plan = _planned(options)
    runtime.say(alike(lambda: estimate(options, plan, cards, card_gb)).table())


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One network of a run, before it has memory."""

    options: RunOptions
    model: nn.Module
    """On the meta device."""
    plan: Plan
    objective: Objective


def run(request: Request, options: RunOptions, runtime: Runtime) -> None:
    """Check everything, train, and write what the run leaves behind. Collective.

    Raises:
        LayerLRError: Bad input, on all ranks alike, before the first step where it can be seen.
        Diverged: Training ran into NaN or infinity.
    """
    # Cheap checks first, so that a typing error costs seconds and not the loading of a model.
    family = get_family(options.model_type, options.objective)
    planned = _plan_each(family, options)
    alike(lambda: check_team(planned, request.sharding, options))
    data, held = alike(lambda: _data_of(options, family, planned))
    alike(lambda: _check_settings(options, runtime))
    folder = alike(
        lambda: outputs.open_output_dir(
            request.output_dir, options.model_path, probe=runtime.is_main, say=runtime.say
        )
    )
    checkpoints = choose_checkpoints(request.resume, folder, runtime, planned)
    options, planned = _in_steps(options, planned, data, checkpoints)
    run_id = rank_zero(lambda: uuid.uuid4().hex[:16])
    kept: Sequence[Kept] = ()
    for name, checkpoint in checkpoints.items():
        past = look_back(checkpoint)
        trained = past.step == options.train.steps
        if trained and rank_zero(partial(_all_written, folder, planned, past)):
            runtime.say(
                f"nothing to train: {checkpoint} is after {past.step} of {past.step} steps;"
                f" {folder / outputs.FINAL}, plan.json and verify.json stay as that run left them"
            )
            return
        # What is left to write is the result of the start that trained.
        run_id = (trained and past.run_id) or run_id
        # Before it is compared with the checkpoint's, which holds these changes.
        kept = past.kept
        plan = alike(partial(resteered, planned[name].plan, kept))
        plan = adapt_plan(checkpoint, plan, runtime, trained=trained)
        planned[name] = replace(planned[name], plan=plan)
    jobs = {}
    for name, one in planned.items():
        _announce(name, one, family, runtime, request.grid)
        engine = _engine(request, one, runtime, alone=len(planned) == 1)
        jobs[name] = Job(
            engine=engine,
            ema=ema_of(options.ema, engine),
            family=family,
            objective=one.objective,
            data=data,
            held=held,
            options=one.options,
            runtime=runtime,
            folder=folder / name,
            network=name,
            run_id=run_id,
        )
    same = request.resume is not None and _all_own(checkpoints, jobs)
    # Until the weights are written: a second signal must not cut the saving short.
    with catch_signals() as stop:
        steering = Steering(folder, options.schedule, kept, continued=same)
        _train_and_save(team_of(jobs, options, folder, steering), stop, checkpoints)


def _all_own(checkpoints: Mapping[str, Path], jobs: Mapping[str, Job]) -> bool:
    """Whether a start goes on with the run of its folder, whose files are then its own."""
    return all(is_own(path, jobs[name].folder) for name, path in checkpoints.items())


def _planned(options: RunOptions) -> tuple[nn.Module, Plan]:
    """Build the model on the meta device, and its plan. Collective."""
    family = get_family(options.model_type, options.objective)
    model = alike(lambda: empty_model(family, options))
    return model, alike(lambda: spare_from_decay(family, model, plan_model(model, options.plan)))


def _plan_each(family: Family, options: RunOptions) -> dict[str, Planned]:
    """Build each network of the run on the meta device, and check its weights. Collective."""
    found = {}
    for name, given in alike(lambda: options_of_each(options)).items():
        model, plan = _planned(given)
        anew = alike(partial(fresh_weights, given))
        alike(partial(check_pretrained, model, given.model_path, fresh=True, anew=anew))
        objective = alike(partial(family.objective, given.objective, Path(given.model_path)))
        alike(partial(check_levels, given.validation, objective))
        found[name] = Planned(options=given, model=model, plan=plan, objective=objective)
    return found


def _data_of(
    options: RunOptions, family: Family, planned: Mapping[str, Planned]
) -> tuple[Dataset, Dataset | None]:
    """Open what trains and what is held out, and check that the model can take it."""
    data = open_dataset(options.data)
    fit_dataset(data, family, live_config(next(iter(planned.values())).model))
    check_empty_prompt(options, data, family)
    return split(data, options.validation)


def _check_settings(options: RunOptions, runtime: Runtime) -> None:
    """Check what needs neither a model nor data."""
    micro_batch_size(options, runtime.world_size)
    check_trackers(options.train.report_to)


def _in_steps(
    options: RunOptions,
    planned: dict[str, Planned],
    data: Dataset,
    checkpoints: Mapping[str, Path],
) -> tuple[RunOptions, dict[str, Planned]]:
    """Turn ``train.epochs`` into steps, now that the data set and the beginning are known."""
    if options.train.epochs is None:
        return options, planned
    past = Past(step=0, run_id=None)
    for checkpoint in checkpoints.values():
        past = look_back(checkpoint)
    steps = alike(lambda: steps_of(options, data, past.step, past.samples))
    timed = {
        name: replace(one, options=with_steps(one.options, steps)) for name, one in planned.items()
    }
    return with_steps(options, steps), timed


def _engine(request: Request, one: Planned, runtime: Runtime, *, alone: bool) -> Engine:
    """Load a network's weights into place. Collective."""
    model, plan, config = one.model, one.plan, request.deepspeed_config
    engine = build_engine(request.sharding, model, plan, one.options, runtime, config)
    if not alone:
        # Before the next one is loaded: the device may hold one only.
        engine.rest()
    return engine


def _all_written(folder: Path, names: Iterable[str], past: Past) -> bool:
    """Whether the result of each network is what the start that trained made of it."""
    finals = [folder / outputs.FINAL / name for name in names]
    return all(outputs.holds_result(final, past.run_id, past.step) for final in finals)


def _announce(name: str, one: Planned, family: Family, runtime: Runtime, form: str) -> None:
    """Print the grid of a network, and what of it does not train."""
    note = one.objective.note if isinstance(one.objective, Noted) else None
    frozen = frozen_line(family, one.model, one.options)
    spared, new = spared_line(family, one.model, one.plan), fresh_line(one.options)
    lines = (frozen, spared, new, note)
    for line in (f"{name}:" if name else None, grid(one.plan, form), *lines):
        if line is not None:
            runtime.say(line)


def _train_and_save(team: Team, stop: StopFlag, checkpoints: Mapping[str, Path]) -> None:
    """Continue or begin, prove, train, prove again, and write the results. Collective."""
    job, runtime = team.face, team.face.runtime
    begin = restore_all(team, checkpoints)
    # After a checkpoint was loaded, which may have overwritten rates.
    proofs = _prove(team, begin.step, begin.step)
    for name, proof in proofs.items():
        runtime.say(f"{name}: {proof.line()}" if name else proof.line())
    prediction = _predict(job)
    if prediction is not None:
        runtime.say(f"[stagehand] {prediction.line()}")
    runtime.say(_sizes(job, begin))
    kept = any(is_own(path, team.jobs[name].folder) for name, path in checkpoints.items())
    # All ranks, though one writes: they end together where its disk is full.
    metrics = alike(
        lambda: _open_files(team, begin, proofs, kept=kept) if runtime.is_main else None
    )
    if prediction is not None:
        write_row(metrics, {"step": begin.step, "prediction": prediction.to_dict()})
    save = Savers(team)
    try:
        outcome = train(team, metrics, stop, begin, save, partial(outputs.draw_generated, team))
    except Diverged:
        # All ranks raise it. The last periodic checkpoint is good, so let it get onto the disk.
        save.finish()
        raise
    finally:
        if metrics is not None:
            metrics.close()
    save.finish()
    if outcome.stopped and outcome.steps == begin.step < job.options.train.steps:
        by, step = team.steering.stopper, begin.step + 1
        runtime.say(f"stopped by {by} before step {step}; nothing new to save")
        return
    # Again, because DeepSpeed, a scheduler or an optimizer may have changed rates on the way.
    after = _prove(team, begin.step, outcome.steps)
    weights = []
    for name, one in team.each():
        ends = {"start": proofs[name].to_dict(), "end": after[name].to_dict()}
        seen = {**ends, "first_step_lr": own(name, outcome.observed)}
        with averaged([one]):
            weights.append(outputs.save_result(one, outcome.steps, seen))
    _finish(team, outcome, weights)


def _prove(team: Team, begin: int, end: int) -> dict[str, Proof]:
    """Verify the live learning rates of each network after ``end`` steps. Collective.

    Args:
        team: The networks.
        begin: Steps that were done before this process trained.
        end: Steps that are done.
    """
    found = {}
    for name, job in team.each():
        factor, steps = team.factor(name, begin, end), team.turns.count(name, end)
        found[name] = alike(partial(job.engine.prove, factor, steps))
    return found


def _open_files(
    team: Team, begin: Position, proofs: Mapping[str, Proof], *, kept: bool
) -> MetricsFile:
    """Begin the files of this run; go on with those that are there where ``kept``."""
    job = team.face
    # Only now, when nothing can be refused any more: bad input must not cost the earlier results.
    previous = previous_config(job.folder)
    try:
        for one in (job, *team.jobs.values()):
            one.folder.mkdir(parents=True, exist_ok=True)
            if not kept:
                outputs.remove_previous_run(one.folder)
        for one in team.jobs.values():
            write_text(one.folder / outputs.PLAN, one.plan.to_json() + "\n")
            outputs.draw_plan(one.plan, one.folder)
        # Where no step is left, this process's config is not what was trained.
        if begin.step < job.options.train.steps:
            sharder = next(iter(proofs.values())).sharder
            write_record(job, begin, sharder=sharder, kept=kept, previous=previous)
        job.runtime.log.open(job.folder / LOG, kept=kept)
        names, config = job.options.train.report_to, resolved(job.options)
        trackers = Trackers(names, job.folder, config, job.runtime.say) if names else None
        path = job.folder / outputs.METRICS
        return MetricsFile(path, first_step=begin.step, trackers=trackers)
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
    if job.held is not None:
        text = f"{text} ({len(job.held)} held out)"
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


def _finish(team: Team, outcome: Outcome, weights: Sequence[Path]) -> None:
    """Draw the samples unless a signal hurries, and say where everything is. Collective."""
    job = team.face
    picture = None if outcome.stopped else outputs.draw_generated(team)
    ended = "ended early after" if outcome.enough else "finished"
    ended = f"stopped by {team.steering.stopper} after" if outcome.stopped else ended
    if team.steering.changed:
        main = job.runtime.is_main
        for one in team.jobs.values():
            alike(partial(outputs.draw_plan, one.plan, one.folder) if main else lambda: None)
    where = " and ".join(map(str, weights))
    job.runtime.say(f"{ended} {outcome.steps} steps; weights in {where}")
    outputs.write_pages(team)
    pages = " and ".join(str(one.folder / outputs.PAGE) for one in team.jobs.values())
    job.runtime.say(f"everything to look at in {pages}")
    if picture is not None:
        grids = " and ".join(str(one.folder / "lr_grid.png") for one in team.jobs.values())
        job.runtime.say(f"learning rates in {grids}, samples in {picture}")
