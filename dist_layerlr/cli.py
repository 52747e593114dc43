"""``dist-layerlr plan|explain|plot|predict``: what a config or streaming does to a model, from its names alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_layerlr import report
from dist_layerlr.build import build_plan
from dist_layerlr.errors import LayerLRError
from dist_layerlr.offload.policy import StreamPolicy
from dist_layerlr.offload.predict import Machine, Workload, layout_from_names, predict
from dist_layerlr.plan import Plan
from dist_layerlr.sources import read_model

_MODEL_HELP = "a .safetensors file, a checkpoint folder, or a tsv of name<TAB>shape (.gz too; - reads stdin)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after a one-line error."""
    args = _parser().parse_args(argv)
    try:
        output = args.run(args)
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
    explain.set_defaults(run=lambda args: report.explain(_plan(args), args.name) + "\n")
    plot = commands.add_parser("plot", help="draw the grid as a heat map")
    plot.add_argument("--output", default="lr_grid.png", help="PNG file to write (default: lr_grid.png)")
    plot.set_defaults(run=_run_plot)
    for command in (plan, explain, plot):
        command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
        if command is explain:
            command.add_argument("name", metavar="NAME", help="a parameter name of MODEL")
        command.add_argument("--config", required=True, metavar="FILE", help="training config (JSON)")
        command.add_argument("--base", metavar="MODEL", help="the full model, when MODEL lists an adapter only")
    _add_predict(commands.add_parser("predict", help="what streaming blocks from the host will cost"))
    return parser


def _add_predict(predict: argparse.ArgumentParser) -> None:
    predict.set_defaults(run=_run_predict)
    predict.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    predict.add_argument("--tokens", type=int, required=True, help="of one microbatch on one device")
    predict.add_argument("--sequence", type=int, help="tokens that attend to each other (default: all)")
    predict.add_argument("--gb-s", type=float, required=True, help="pinned host to device, 1e9 bytes per second")
    predict.add_argument("--tflops", type=float, required=True, help="achieved, 1e12 operations per second")
    window = StreamPolicy().prefetch_window
    predict.add_argument("--window", type=int, default=window, help=f"units fetched ahead (default {window})")
    predict.add_argument("--resident", type=int, default=0, help="units that stay on the device (default 0)")
    predict.add_argument("--full", action="store_true", help="full finetune instead of LoRA")
    predict.add_argument("--no-checkpointing", action="store_true", help="blocks are not computed again in backward")
    predict.add_argument("--micro-steps", type=int, default=1, help="microbatches per step (default 1)")
    predict.add_argument("--device-bytes", type=float, default=2.0, help="per parameter on the device (default 2)")
    predict.add_argument("--host-bytes", type=float, help="per parameter on the host (default: as on the device)")
    predict.add_argument("--host-gb-s", type=float, help="memory bandwidth of the host, for a CPU optimizer")
    predict.add_argument("--json", action="store_true")


def _plan(args: argparse.Namespace) -> Plan:
    base = read_model(args.base) if args.base else None
    return build_plan(read_model(args.model), args.config, base=base)


def _run_plan(args: argparse.Namespace) -> str:
    plan = _plan(args)
    if args.format == "json":
        return plan.to_json() + "\n"
    return report.to_csv(plan) if args.format == "csv" else report.grid(plan) + "\n"


def _run_plot(args: argparse.Namespace) -> str:
    from dist_layerlr.plot import draw_grid

    draw_grid(_plan(args), Path(args.output))
    return f"wrote {args.output}\n"


def _run_predict(args: argparse.Namespace) -> str:
    layout = layout_from_names(
        read_model(args.model),
        full=args.full,
        resident=args.resident,
        device_bytes=args.device_bytes,
        host_bytes=args.host_bytes,
    )
    work = Workload(
        tokens=args.tokens,
        sequence=args.sequence,
        checkpointing=not args.no_checkpointing,
        micro_steps=args.micro_steps,
    )
    machine = Machine(gb_s=args.gb_s, tflops=args.tflops, host_gb_s=args.host_gb_s)
    prediction = predict(layout, work, machine, window=args.window)
    return (json.dumps(prediction.to_dict(), indent=1) if args.json else prediction.table()) + "\n"


if __name__ == "__main__":
    sys.exit(main())
