"""Finetune a model with per-layer learning rates, under any launcher.

    python launch/train.py --config launch/configs/quickstart.json
    torchrun --nproc_per_node 2 launch/train.py --config FILE --sharding fsdp2 --resume latest
    deepspeed --num_gpus 2 launch/train.py --config FILE --deepspeed_config ds_configs/zero2.json

Writes plan.json, verify.json, metrics.jsonl, lr_grid.png, samples/ and final/ into --output-dir, in
place of those of an earlier run, and checkpoints/ every train.save_every steps, which --resume
continues under any sharding.

Bad input: one line, exit status 2 on every rank, before training starts. A damaged sample is found
only when it is read. A loss of NaN or infinity: one line, status 1, nothing saved. SIGINT and
SIGTERM: the step is finished, a checkpoint and the weights are saved, status 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

try:
    from dist_layerlr.errors import ConfigError, LayerLRError
    from dist_layerlr.ranks import RankFailure, is_shared
    from launch.trainer.cli import Parser, complain
    from launch.trainer.engines.offload import check_streaming
    from launch.trainer.engines.sharding import (
        NONE,
        SHARDINGS,
        ZERO,
        Sharding,
        check_accelerate_env,
        check_launch,
    )
    from launch.trainer.options import load_options
    from launch.trainer.runtime import Diverged, start, stop
except ModuleNotFoundError as error:
    # Nothing of the project can be imported, so this line cannot come from the project.
    print(f'train.py: error: {error}. Run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job. Returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        options = load_options(args.config, args.set, args.max_steps)
        sharding = _sharding(args)
        if not args.plan_only:
            # Before ranks meet: they all see the same input, so each ends by itself.
            check_accelerate_env(sharding)
            check_launch(sharding, options.train.global_batch)
            check_streaming(options, sharding)
        runtime = start(alone=args.plan_only or sharding.alone)
        # Late, because it imports diffusers' and PEFT's dependencies: a wrong flag ends sooner.
        from launch.trainer import job

        if args.plan_only:
            job.print_plan(options, runtime)
        else:
            request = job.Request(
                sharding=sharding,
                deepspeed_config=args.deepspeed_config,
                output_dir=args.output_dir,
                resume=args.resume,
            )
            job.run(request, options, runtime)
        runtime.barrier()
        return 0
    except LayerLRError as error:
        if isinstance(error, RankFailure) and error.__cause__ is not None:
            # Not bad input but a defect, on this rank: its traceback is worth more than one line.
            traceback.print_exception(error)
        complain("train.py", error, everywhere=not is_shared(error))
        return 1 if isinstance(error, Diverged) else 2
    finally:
        stop()


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="train.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="training config (JSON)")
    names = [name for name, row in SHARDINGS.items() if not row.by_deepspeed]
    add("--sharding", choices=names, help="how ranks share the model (default: none)")
    add("--deepspeed_config", metavar="FILE", help="train under DeepSpeed with this ds_config")
    add("--output-dir", default="runs/latest", metavar="DIR", help="default: runs/latest")
    add(
        "--resume",
        metavar="latest|PATH",
        help="continue from the newest checkpoint of --output-dir, if any, or from PATH",
    )
    add("--max-steps", type=int, metavar="N", help="overrides train.steps")
    add("--set", action="append", default=[], metavar="A.B=C", help="override one config value")
    add("--plan-only", action="store_true", help="print the grid and stop")
    # The deepspeed launcher adds it; ranks read LOCAL_RANK instead.
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _sharding(args: argparse.Namespace) -> Sharding:
    """Return the row that the flags ask for."""
    if args.deepspeed_config is None:
        return NONE if args.sharding is None else SHARDINGS[args.sharding]
    if args.sharding is not None:
        raise ConfigError(
            "Invalid --sharding with --deepspeed_config: DeepSpeed shards the model. Pass one of"
            " them."
        )
    return ZERO


def _leave(status: int) -> None:
    """End the process without interpreter shutdown.

    gloo's threads can outlive the process group and abort a run that is complete.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(main())
