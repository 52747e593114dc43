"""``dist-layerlr plan|explain|plot``: what a config does to a model, from its names alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_layerlr import report
from dist_layerlr.build import build_plan
from dist_layerlr.errors import LayerLRError
from dist_layerlr.plan import Plan
from dist_layerlr.sources import read_model

_MODEL_HELP = "a .safetensors file, a checkpoint folder, or a tsv of name<TAB>shape (.gz too; - reads stdin)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    try:
        output = args.run(args, _plan(args))
        sys.stdout.write(output)
        sys.stdout.flush()
    except LayerLRError as error:
        print(f"dist-layerlr: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(f"dist-layerlr: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-layerlr", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="print the grid of learning rates, or every parameter's as JSON or CSV")
    shape = plan.add_mutually_exclusive_group()
    shape.add_argument("--json", dest="format", action="store_const", const="json")
    shape.add_argument("--csv", dest="format", action="store_const", const="csv")
    plan.set_defaults(run=_run_plan)
    explain = commands.add_parser("explain", help="say how one parameter came to its learning rate")
    explain.set_defaults(run=lambda args, plan: report.explain(plan, args.name) + "\n")
    plot = commands.add_parser("plot", help="draw the grid as a heat map")
    plot.add_argument("--output", default="lr_grid.png", help="PNG file to write (default: lr_grid.png)")
    plot.set_defaults(run=_run_plot)
    for command in (plan, explain, plot):
        command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
        if command is explain:
            command.add_argument("name", metavar="NAME", help="a parameter name of MODEL")
        command.add_argument("--config", required=True, metavar="FILE", help="training config (JSON)")
        command.add_argument("--base", metavar="MODEL", help="the full model, when MODEL lists an adapter only")
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    base = read_model(args.base) if args.base else None
    return build_plan(read_model(args.model), args.config, base=base)


def _run_plan(args: argparse.Namespace, plan: Plan) -> str:
    if args.format == "json":
        return plan.to_json() + "\n"
    return report.to_csv(plan) if args.format == "csv" else report.grid(plan) + "\n"


def _run_plot(args: argparse.Namespace, plan: Plan) -> str:
    from dist_layerlr.plot import draw_grid

    draw_grid(plan, Path(args.output))
    return f"wrote {args.output}\n"


if __name__ == "__main__":
    sys.exit(main())
