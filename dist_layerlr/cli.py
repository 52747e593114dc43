"""``dist-layerlr``: what a config, streaming or a checkpoint does to a model, from its names.

Commands: plan, explain, plot, predict, diff, export.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_layerlr.checkpoint.folders import latest
from dist_layerlr.errors import CheckpointError, ConfigError, LayerLRError, error_line
from dist_layerlr.files import read_json
from dist_layerlr.offload.policy import StreamPolicy
from dist_layerlr.offload.predict import layout_from_names, predict
from dist_layerlr.offload.prediction import Machine, Workload
from dist_layerlr.plan.build import build_plan
from dist_layerlr.plan.diff import PLAN_FILE, Rows, plan_diff, read_rows
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.names import parse
from dist_layerlr.plan.read import read_model
from dist_layerlr.plan.training_config import check_training_config
from dist_layerlr.report.grid import FOLDED, GRIDS, explain, grid, to_csv

_PROGRAM = "dist-layerlr"
_MODEL_HELP = (
    "a .safetensors file, a checkpoint folder, or a tsv of name<TAB>shape (.gz too; - reads stdin)"
)
_RUN_HELP = f"with --html, the folder of a run; or a model: {_MODEL_HELP}"
_BASE_HELP = "the full model, when MODEL lists an adapter only"
Output = tuple[str, int]
"""(text for stdout, exit status)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 where ``diff`` found a difference; 2 after a one-line error; 3 after a traceback.
    """
    args = _parser().parse_args(argv)
    status = 0
    try:
        output, status = args.run(args)
        sys.stdout.write(output)
        sys.stdout.flush()
    except LayerLRError as error:
        print(error_line(_PROGRAM, error), file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(error_line(_PROGRAM, f"cannot write the output: {error.strerror}"), file=sys.stderr)
        return 2
    except Exception:
        # Python would end with status 1, which a script reads as "the plans differ".
        traceback.print_exc()
        return 3
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan", help="print the grid of learning rates, or every parameter's as JSON or CSV"
    )
    shape = plan.add_mutually_exclusive_group()
    shape.add_argument("--json", dest="format", action="store_const", const="json")
    shape.add_argument("--csv", dest="format", action="store_const", const="csv")
    shape.add_argument(
        "--grid", choices=GRIDS, default=FOLDED, help="blocks as ranges (default), or each"
    )
    plan.set_defaults(run=_run_plan)
    explain = commands.add_parser("explain", help="say how one parameter came to its learning rate")
    explain.set_defaults(run=_run_explain)
    plot = commands.add_parser("plot", help="draw the grid as a heat map, or a run as a page")
    plot.add_argument("--html", action="store_true", help="write one HTML page, not a PNG")
    plot.add_argument(
        "--output", metavar="FILE", help="to write (default: lr_grid.png, or page.html)"
    )
    plot.set_defaults(run=_run_plot)
    for command in (plan, explain, plot):
        what = ("MODEL", _MODEL_HELP) if command is not plot else ("RUN|MODEL", _RUN_HELP)
        command.add_argument("model", metavar=what[0], help=what[1])
        if command is explain:
            command.add_argument("name", metavar="NAME", help="a parameter name of MODEL")
        needed = command is not plot
        command.add_argument(
            "--config", required=needed, metavar="FILE", help="training config (JSON)"
        )
        command.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    _add_predict(commands)
    _add_diff(commands)
    _add_export(commands)
    return parser


def _add_predict(commands: Any) -> None:
    text = "what streaming blocks from the host will cost: time, memory, hidden or not"
    predict = commands.add_parser("predict", help=text, description=text)
    predict.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    predict.add_argument(
        "--tokens", type=int, required=True, help="of one microbatch on one device"
    )
    predict.add_argument(
        "--sequence", type=int, help="tokens that attend to each other (default: all)"
    )
    predict.add_argument(
        "--gb-s", type=float, required=True, help="pinned host to device, 1e9 bytes per second"
    )
    predict.add_argument(
        "--tflops", type=float, required=True, help="achieved, 1e12 operations per second"
    )
    window = StreamPolicy().prefetch_window
    predict.add_argument(
        "--window", type=int, default=window, help=f"units fetched ahead (default {window})"
    )
    predict.add_argument(
        "--resident", type=int, default=0, help="units that stay on the device (default 0)"
    )
    predict.add_argument("--full", action="store_true", help="full finetune instead of LoRA")
    predict.add_argument(
        "--no-checkpointing", action="store_true", help="blocks are not computed again in backward"
    )
    predict.add_argument(
        "--micro-steps", type=int, default=1, help="microbatches per step (default 1)"
    )
    predict.add_argument(
        "--device-bytes", type=float, default=2.0, help="per parameter on the device (default 2)"
    )
    predict.add_argument(
        "--host-bytes", type=float, help="per parameter on the host (default: as on the device)"
    )
    predict.add_argument(
        "--host-gb-s", type=float, help="memory bandwidth of the host, for a CPU optimizer"
    )
    predict.add_argument("--json", action="store_true")
    predict.set_defaults(run=_run_predict)


def _add_diff(commands: Any) -> None:
    text = "print what trains differently; status 0: nothing, 1: something, 2: error, 3: a defect"
    diff = commands.add_parser("diff", help=text, description=text)
    where = (
        "checkpoint, folder of checkpoints or run folder, plan.json, or training config (JSON, with"
        " --model)"
    )
    diff.add_argument("old", metavar="A", help=where)
    diff.add_argument("new", metavar="B", help=where)
    diff.add_argument("--model", metavar="MODEL", help=f"for configs: {_MODEL_HELP}")
    diff.add_argument("--base", metavar="MODEL", help=_BASE_HELP)
    diff.add_argument("--names", action="store_true", help="one line per parameter")
    diff.set_defaults(run=_run_diff)


def _add_export(commands: Any) -> None:
    text = (
        "write the weights of a checkpoint as files that diffusers, transformers, PEFT, ComfyUI or"
        " kohya's programs load"
    )
    export = commands.add_parser("export", help=text, description=text)
    where = "a checkpoint folder, or a folder of them or of a run: then the newest"
    export.add_argument("checkpoint", metavar="CKPT", help=where)
    export.add_argument("output", metavar="OUT", help="folder to write")
    formats = ("diffusers", "transformers", "peft", "pipeline", "comfyui", "kohya")
    export.add_argument(
        "--format", required=True, choices=formats, help="full weights (the first two), or a LoRA"
    )
    export.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: as trained")
    export.add_argument(
        "--base",
        metavar="DIR",
        help="folder of the trained model: its config.json is copied, or names its class",
    )
    export.add_argument(
        "--adapter", default="default", metavar="NAME", help="PEFT's name of the adapter"
    )
    export.add_argument(
        "--adapter-config",
        metavar="FILE",
        help="adapter_config.json, where the checkpoint has none",
    )
    export.set_defaults(run=_run_export)


def _plan(args: argparse.Namespace, config: str) -> Plan:
    # A plan is made from a few of its keys: the others are checked, because their reader would.
    check_training_config(read_json(config))
    base = read_model(args.base) if args.base else None
    plan = build_plan(read_model(args.model), config, base=base)
    _say_if_adapter(plan, config)
    return plan


def _say_if_adapter(plan: Plan, config: str) -> None:
    """Say that a config trains an adapter, where MODEL lists full weights only."""
    raw = read_json(config)
    asked = raw.get("training_method", "lora" if "adapter" in raw else None)
    if asked == "lora" and not any(parse(name).is_adapter for name in plan.entries):
        print(
            f"{_PROGRAM}: note: {config} trains a LoRA; this is the plan of all weights of MODEL."
            " Give the adapter's names as MODEL and the model as --base.",
            file=sys.stderr,
        )


def _run_plan(args: argparse.Namespace) -> Output:
    plan = _plan(args, args.config)
    if args.format == "json":
        return plan.to_json() + "\n", 0
    return (to_csv(plan) if args.format == "csv" else grid(plan, args.grid) + "\n"), 0


def _run_explain(args: argparse.Namespace) -> Output:
    return explain(_plan(args, args.config), args.name) + "\n", 0


def _run_plot(args: argparse.Namespace) -> Output:
    from dist_layerlr.report.heatmap import draw_grid
    from dist_layerlr.report.page import write_page

    output = Path(args.output or ("page.html" if args.html else "lr_grid.png"))
    if args.html and args.config is None:
        write_page(output, Path(args.model), f"Run {Path(args.model).resolve().name}")
    elif args.config is None:
        raise ConfigError(
            "Missing --config FILE: rates are planned from a training config. A run needs none"
            " with --html."
        )
    elif args.html:
        plan = _plan(args, args.config)
        write_page(output, plan, f"Learning rates of {plan.config.model_type}")
    else:
        draw_grid(_plan(args, args.config), output)
    return f"wrote {output}\n", 0


def _run_predict(args: argparse.Namespace) -> Output:
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
    return (
        json.dumps(prediction.to_dict(), indent=1) if args.json else prediction.table()
    ) + "\n", 0


def _run_diff(args: argparse.Namespace) -> Output:
    lines = plan_diff(
        *(_plan_or_rows(args, source) for source in (args.old, args.new)), every_name=args.names
    )
    return "".join(f"{line}\n" for line in lines), int(bool(lines))


def _run_export(args: argparse.Namespace) -> Output:
    import torch

    from dist_layerlr.export.export import export_checkpoint

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    files = export_checkpoint(
        args.checkpoint,
        args.output,
        format=args.format,
        dtype=dtypes.get(args.dtype),
        adapter=args.adapter,
        config=read_json(args.adapter_config) if args.adapter_config else None,
        base=args.base,
    )
    return "".join(f"wrote {file}\n" for file in files), 0


def _plan_or_rows(args: argparse.Namespace, source: str) -> Plan | Rows:
    rows = read_rows(_with_plan(Path(source)))
    if rows is not None:
        return rows
    if args.model is None:
        raise ConfigError(
            f"{source!r} is no plan. To compare what a training config plans, pass --model MODEL."
        )
    return _plan(args, source)


def _with_plan(path: Path) -> Path:
    """A folder of checkpoints stands for the newest of them."""
    if not path.is_dir() or (path / PLAN_FILE).exists():
        return path
    try:
        return latest(path)
    except CheckpointError:
        raise ConfigError(
            f"{str(path)!r} holds neither {PLAN_FILE} nor a complete checkpoint. Check the path."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
