"""The command line of ``launch/train.py``, and what it asks for beside the training config."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from dist_layerlr.errors import ConfigError
from dist_layerlr.report import FOLDED, GRIDS
from launch.trainer.cli import Parser, example
from launch.trainer.engines.sharding import (
    NONE,
    SHARDINGS,
    ZERO,
    Sharding,
    check_accelerate_env,
    check_launch,
    check_streaming,
)
from launch.trainer.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line says beside the training config."""

    sharding: Sharding
    deepspeed_config: str | None = None
    """JSON file, if DeepSpeed shards."""
    output_dir: str
    resume: str | None = None
    """`latest` or a path; None: start from the beginning."""
    grid: str = FOLDED
    """How the learning rates are printed: one of ``GRIDS``."""

    def check(self, options: RunOptions) -> None:
        """Refuse a launcher, batch or offload that does not fit the sharder.

        Raises:
            ConfigError: names the flag or field, and what to pass instead.
        """
        check_accelerate_env(self.sharding)
        check_launch(self.sharding, options.train.global_batch)
        check_streaming(options, self.sharding)


def make_parser(description: str | None) -> Parser:
    """The command line, as ``train.py`` reads it and docs/cli.md lists it."""
    line = "python launch/train.py --config launch/configs/sd15.json --plan-only"
    parser = Parser(prog="train.py", description=description, **example(line))
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="training config (JSON, YAML or TOML)")
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
    add("--grid", choices=GRIDS, default=FOLDED, help="blocks as ranges (default), or each")
    add("--plan-only", action="store_true", help="print the grid and stop")
    add("--estimate", action="store_true", help="print the memory per rank and stop")
    add("--cards", type=int, default=8, metavar="N", help="of --estimate (default: 8)")
    add("--card-gb", type=float, default=80.0, metavar="GB", help="of --estimate (default: 80)")
    # The deepspeed launcher adds it; ranks read LOCAL_RANK instead.
    add("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def make_request(args: argparse.Namespace) -> Request:
    """Find the sharder that the flags ask for.

    Raises:
        ConfigError: They ask for two.
    """
    if args.deepspeed_config is not None and args.sharding is not None:
        raise ConfigError(
            "Invalid --sharding with --deepspeed_config: DeepSpeed shards the model. Pass one of"
            " them."
        )
    sharding = NONE if args.sharding is None else SHARDINGS[args.sharding]
    if args.deepspeed_config is not None:
        sharding = ZERO
    return Request(
        sharding=sharding,
        deepspeed_config=args.deepspeed_config,
        output_dir=args.output_dir,
        resume=args.resume,
        grid=args.grid,
    )
