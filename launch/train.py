"""Finetune a diffusion transformer with per-layer learning rates, under any launcher.

    python launch/train.py --config launch/configs/quickstart.json
    torchrun --nproc_per_node 2 launch/train.py --config FILE --sharding fsdp2 --resume latest
    deepspeed --num_gpus 2 launch/train.py --config FILE --deepspeed_config ds_configs/zero2.json

Writes plan.json, verify.json, metrics.jsonl, lr_grid.png, samples/ and final/ into --output-dir, in
place of those of an earlier run, and checkpoints/ every train.save_every steps, which --resume
continues under any sharding. Bad input ends with one line and status 2 on every rank, before
training unless it is a broken sample. A loss of NaN or infinity ends with one line and status 1,
nothing saved. SIGINT and SIGTERM finish the step, save a checkpoint and the weights, end with 0.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr.errors import LayerLRError
from dist_layerlr.report.grid import grid
from launch.trainer.cli import Parser, complain
from launch.trainer.engines import SHARDINGS, ZERO, build_engine
from launch.trainer.engines.offload import check_streaming
from launch.trainer.options import RunOptions, load_options
from launch.trainer.runtime import (
    Diverged,
    Runtime,
    check_accelerate_env,
    check_launch,
    is_shared,
    start,
    stop,
)

if TYPE_CHECKING:
    from dist_layerlr.offload import Prediction
    from dist_layerlr.plan.entries import Plan
    from launch.trainer.data.base import Dataset
    from launch.trainer.engines.base import Engine
    from launch.trainer.families.base import Family
    from launch.trainer.loop import StopFlag


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        options = load_options(args.config, args.set, args.max_steps)
        sharding = _sharding(args)
        if not args.plan_only:
            check_accelerate_env(sharding)
            check_launch(sharding, options.train.global_batch)
            check_streaming(options, sharding)
        runtime = start("none" if args.plan_only else sharding)
        status = _run(args, options, sharding, runtime)
        runtime.barrier()
        return status
    except LayerLRError as error:
        complain("train.py", error, everywhere=not is_shared(error))
        return 1 if isinstance(error, Diverged) else 2
    finally:
        stop()


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train.py", description=__doc__, formatter_class=form)
    parser.add_argument("--config", required=True, metavar="FILE", help="training config (JSON)")
    parser.add_argument(
        "--sharding", choices=SHARDINGS, help="how ranks share the model (default: none)"
    )
    parser.add_argument(
        "--deepspeed_config", metavar="FILE", help="train under DeepSpeed with this ds_config"
    )
    parser.add_argument(
        "--output-dir", default="runs/latest", metavar="DIR", help="default: runs/latest"
    )
    parser.add_argument(
        "--resume",
        metavar="latest|PATH",
        help="continue from the newest checkpoint of --output-dir, if any, or from PATH",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="overrides train.steps")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override one config value"
    )
    parser.add_argument("--plan-only", action="store_true", help="print the grid and stop")
    parser.add_argument(
        "--local_rank", type=int, default=0, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it
    return parser


def _sharding(args: argparse.Namespace) -> str:
    from dist_layerlr.errors import ConfigError

    if args.deepspeed_config is None:
        return args.sharding or "none"
    if args.sharding is not None:
        raise ConfigError(
            "Invalid --sharding with --deepspeed_config: DeepSpeed shards the model. Pass one of"
            " them."
        )
    return ZERO


def _run(args: argparse.Namespace, options: RunOptions, sharding: str, runtime: Runtime) -> int:
    from dist_layerlr import plan_model
    from dist_layerlr.weights import check_pretrained
    from launch.trainer import outputs
    from launch.trainer.data import check_dataset, open_dataset
    from launch.trainer.families import get_family
    from launch.trainer.loop import catch_signals, micro_batch_size
    from launch.trainer.resume import adapt_plan, choose_checkpoint
    from launch.trainer.weights import empty_model

    family = get_family(options.model_type)
    model = runtime.agree(lambda: empty_model(family, options))
    plan = runtime.agree(lambda: plan_model(model, options.plan))
    say = partial(print, flush=True) if runtime.is_main else (lambda *_, **__: None)
    if args.plan_only:
        say(grid(plan))
        return 0
    runtime.agree(lambda: check_pretrained(model, options.model_path, fresh=True))
    data = runtime.agree(lambda: open_dataset(options.data))
    shape: Any = model.config
    runtime.agree(lambda: check_dataset(data, family, shape))
    runtime.agree(lambda: micro_batch_size(options, runtime.world_size))
    folder = runtime.agree(
        lambda: outputs.open_output_dir(args.output_dir, options.model_path, probe=runtime.is_main)
    )
    checkpoint = choose_checkpoint(args.resume, folder, runtime, say)
    if checkpoint is not None:
        plan = adapt_plan(checkpoint, plan, say)
    say(grid(plan))
    engine = build_engine(sharding, model, plan, options, runtime, args.deepspeed_config)
    with catch_signals() as stop:
        _train_and_save(engine, family, data, plan, options, runtime, folder, stop, checkpoint)
    return 0


def _train_and_save(
    engine: Engine,
    family: Family,
    data: Dataset,
    plan: Plan,
    options: RunOptions,
    runtime: Runtime,
    folder: Path,
    stop: StopFlag,
    checkpoint: Path | None,
) -> None:
    from dist_layerlr.files import write_json, write_text
    from launch.trainer import outputs
    from launch.trainer.loop import Position, train
    from launch.trainer.metrics import MetricsFile
    from launch.trainer.resume import finish_saving, is_own, restore, saver

    say = partial(print, flush=True) if runtime.is_main else (lambda *_, **__: None)
    begin = Position() if checkpoint is None else restore(engine, checkpoint, options, say)
    proof = runtime.agree(lambda: engine.prove(1.0))
    say(proof.line())
    prediction = _predict(engine, family, data, options, runtime)
    if prediction is not None:
        say(f"[stagehand] {prediction.line()}")
    if runtime.is_main:
        if checkpoint is None or not is_own(checkpoint, folder):
            outputs.remove_previous_run(folder)
        write_text(folder / "plan.json", plan.to_json() + "\n")
        outputs.draw_plan(plan, folder)
    metrics = (
        MetricsFile(folder / "metrics.jsonl", first_step=begin.step) if runtime.is_main else None
    )
    if metrics is not None and prediction is not None:
        metrics.write({"step": begin.step, "prediction": prediction.to_dict()})
    save = saver(engine, options, folder)
    try:
        outcome = train(engine, family, data, options, runtime, metrics, stop, begin, save)
    except Diverged:  # on all ranks alike; the checkpoint before it is good
        finish_saving()
        raise
    finish_saving()
    after = runtime.agree(lambda: engine.prove(outcome.last_factor))
    weights = outputs.save_weights(engine, plan, options, runtime, folder, outcome.steps)
    if runtime.is_main:
        seen = {"start": proof.to_dict(), "end": after.to_dict(), "first_step_lr": outcome.observed}
        write_json(folder / "verify.json", seen)
    picture = (
        None
        if outcome.stopped
        else outputs.draw_generated(engine, family, data, options, runtime, folder)
    )
    say(
        f"{'stopped by a signal after' if outcome.stopped else 'finished'} {outcome.steps} steps;"
        f" weights in {weights}"
    )
    if picture is not None:
        say(f"learning rates in {folder / 'lr_grid.png'}, samples in {picture}")


def _predict(
    engine: Engine, family: Family, data: Dataset, options: RunOptions, runtime: Runtime
) -> Prediction | None:
    """What a step will cost while streaming, going by the first sample."""
    from dist_layerlr.sharders.model import unwrap
    from launch.trainer.loop import micro_batch_size

    model: Any = unwrap(engine.model)
    micro = micro_batch_size(options, runtime.world_size)
    micro_steps = options.train.global_batch // runtime.world_size // micro
    return engine.predict(micro * family.tokens(model.config, data[0]), micro_steps, options)


def _leave(status: int) -> None:
    """End the process without interpreter shutdown: gloo's threads can outlive it and abort a run
    that is complete.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(main())
