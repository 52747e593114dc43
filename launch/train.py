"""Finetune a model with per-layer learning rates, under any launcher.

    python launch/train.py --config launch/configs/quickstart.json
    torchrun --nproc_per_node 2 launch/train.py --config FILE --sharding fsdp2 --resume latest
    deepspeed --num_gpus 2 launch/train.py --config FILE --deepspeed_config ds_configs/zero2.json

Writes plan.json, verify.json, metrics.jsonl, page.html, lr_grid.png, samples/, run.json,
resolved_config.json, train.log and final/ into --output-dir, in place of those of an earlier run
(of its final/ when this one's is complete), and checkpoints/ every train.save_every steps, which
--resume continues under any sharding.

Bad input: one line, exit status 2, before training starts. A damaged sample is found only when it
is read. A loss of NaN or infinity: one line, status 1, nothing saved. SIGINT and SIGTERM: the
microbatch at hand is finished, a checkpoint and the weights are saved, status 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

try:
    from launch.trainer.launcher import end_with_launcher

    if __name__ == "__main__":
        # Before torch is imported, which takes seconds: a launcher may die in these too.
        end_with_launcher("train.py")

    from dist_layerlr.errors import LayerLRError
    from dist_layerlr.ranks import RankFailure, is_shared
    from launch.trainer.cli import complain
    from launch.trainer.options import load_options
    from launch.trainer.request import make_parser as parser_of
    from launch.trainer.request import make_request
    from launch.trainer.runlog import RunLog
    from launch.trainer.runtime import Diverged, start, stop
except ModuleNotFoundError as error:
    # Nothing of the project can be imported, so this line cannot come from the project.
    print(f'train.py: error: {error}. Run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """What this program reads its command line with."""
    return parser_of(__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job. Returns the exit status."""
    args = make_parser().parse_args(argv)
    log = RunLog()
    try:
        outline = args.plan_only or args.estimate
        options = load_options(args.config, args.set, args.max_steps, outline=outline)
        request = make_request(args)
        if not outline:
            # Before ranks meet: they all see the same input, so each can end by itself.
            request.check(options)
        runtime = start(alone=outline or request.sharding.alone, log=log)
        # Late, because it takes seconds to import: a wrong flag ends sooner.
        from launch.trainer.run import print_estimate, print_plan, run

        if args.plan_only:
            print_plan(options, runtime, args.grid)
        elif args.estimate:
            print_estimate(options, runtime, args.cards, args.card_gb)
        else:
            run(request, options, runtime)
        runtime.barrier()
        return 0
    except LayerLRError as error:
        if isinstance(error, RankFailure) and error.__cause__ is not None:
            # Not bad input but a defect, on this rank: its traceback is worth more than one line.
            traceback.print_exception(error)
        log.write(f"error: {error}")
        complain("train.py", error, everywhere=not is_shared(error))
        return 1 if isinstance(error, Diverged) else 2
    except Exception:
        log.write(traceback.format_exc())
        raise
    finally:
        log.close()
        stop()


def _leave(status: int) -> None:
    """End the process without interpreter shutdown.

    gloo's threads can outlive the process group and abort a run that is complete.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(main())
