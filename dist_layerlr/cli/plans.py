"""Commands about plans: plan, explain, plot, diff."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.checkpoint.folders import latest
from dist_layerlr.cli.command import (
    BASE_HELP,
    CONFIG_HELP,
    MODEL_HELP,
    PROGRAM,
    RUN_HELP,
    Output,
    add_command,
    as_json,
)
from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.files import read_config
from dist_layerlr.plan.build import build_plan
from dist_layerlr.plan.diff import PLAN_FILE, Rows, plan_diff, read_rows
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.plan.read import read_model
from dist_layerlr.plan.training_config import check_training_config
from dist_layerlr.report.evidence import evidence_line
from dist_layerlr.report.grid import FOLDED, GRIDS, explain, grid, to_csv


def add_to(commands: Any) -> None:
    """Declare them."""
    plan = add_command(
        commands,
        "plan",
        _run_plan,
        text="print the grid of learning rates, or every parameter's as JSON or CSV",
        examples=[
            "plan model.safetensors --config config.json",
            "plan lora.safetensors --base transformer/ --config config.yaml --csv > rates.csv",
        ],
        takes_json=False,
    )
    # JSON is one of several forms here, so the flag that commands have in common is not used.
    shape = plan.add_mutually_exclusive_group()
    help_text = "write every parameter's rate as JSON"
    shape.add_argument("--json", dest="format", action="store_const", const="json", help=help_text)
    shape.add_argument("--csv", dest="format", action="store_const", const="csv", help="as CSV")
    shape.add_argument(
        "--grid", choices=GRIDS, default=FOLDED, help="blocks as ranges (default), or each"
    )
    plan.add_argument(
        "--at-step", type=int, metavar="N", help="rates of one optimizer step (timings)"
    )
    explain = add_command(
        commands,
        "explain",
        _run_explain,
        text="say how one parameter came to its learning rate",
        examples=["explain model.safetensors blocks.0.attn.to_q.weight --config config.json"],
    )
    plot = _add_plot(commands)
    for command in (plan, explain, plot):
        what = ("MODEL", MODEL_HELP) if command is not plot else ("RUN|MODEL", RUN_HELP)
        command.add_argument("model", metavar=what[0], help=what[1])
        if command is explain:
            command.add_argument("name", metavar="NAME", help="a parameter name of MODEL")
        needed = command is not plot
        command.add_argument("--config", required=needed, metavar="FILE", help=CONFIG_HELP)
        command.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    _add_diff(commands)


def _add_plot(commands: Any) -> argparse.ArgumentParser:
    plot = add_command(
        commands,
        "plot",
        _run_plot,
        text="draw the grid as a heat map, or a run as a page",
        examples=[
            "plot model.safetensors --config config.json --output rates.png",
            "plot model.safetensors --config config.json --over-time 5000",
            "plot runs/latest --html",
        ],
    )
    shape = plot.add_mutually_exclusive_group()
    shape.add_argument("--html", action="store_true", help="write one HTML page, not a PNG")
    shape.add_argument(
        "--over-time", type=int, metavar="STEPS", help="draw the rates over a run of these steps"
    )
    plot.add_argument(
        "--output",
        metavar="FILE",
        help="to write (default: lr_grid.png, lr_over_time.png or page.html)",
    )
    return plot


def _add_diff(commands: Any) -> None:
    diff = add_command(
        commands,
        "diff",
        _run_diff,
        text="print what trains differently between two plans, runs or configs",
        examples=[
            "diff runs/a runs/b",
            "diff old.json new.yaml --model model.safetensors --names",
        ],
        statuses={0: "nothing differs", 1: "something does"},
    )
    where = (
        "checkpoint, folder of checkpoints or run folder, plan.json, or training config (with"
        " --model)"
    )
    diff.add_argument("old", metavar="A", help=where)
    diff.add_argument("new", metavar="B", help=where)
    diff.add_argument("--model", metavar="MODEL", help=f"for configs: {MODEL_HELP}")
    diff.add_argument("--base", metavar="MODEL", help=BASE_HELP)
    diff.add_argument("--names", action="store_true", help="one line per parameter")


def _plan(args: argparse.Namespace, config: str) -> Plan:
    # A plan is made from a few of its keys: the others are checked, because their reader would.
    check_training_config(read_config(config))
    base = read_model(args.base) if args.base else None
    plan = build_plan(read_model(args.model), config, base=base)
    _say_if_adapter(plan, config)
    return plan


def _say_if_adapter(plan: Plan, config: str) -> None:
    """Say that a config trains an adapter, where MODEL lists full weights only."""
    raw = read_config(config)
    asked = raw.get("training_method", "lora" if "adapter" in raw else None)
    if asked == "lora" and not any(parse(name).is_adapter for name in plan.entries):
        print(
            f"{PROGRAM}: note: {config} trains a LoRA; this is the plan of all weights of MODEL."
            " Give the adapter's names as MODEL and the model as --base.",
            # What another program reads from stdout stays JSON or CSV.
            file=sys.stderr,
        )


def _run_plan(args: argparse.Namespace) -> Output:
    plan = _plan(args, args.config)
    if args.at_step is not None:
        plan = plan.at_step(fields.integer(0)("--at-step", args.at_step))
    if args.format == "json":
        return plan.to_json() + "\n", 0
    if args.format == "csv":
        return to_csv(plan), 0
    lines = filter(None, (grid(plan, args.grid), evidence_line(plan)))
    return "".join(f"{line}\n" for line in lines), 0


def _run_explain(args: argparse.Namespace) -> Output:
    plan = _plan(args, args.config)
    text = explain(plan, args.name)
    # The name may carry wrappers, which the plan's keys do not.
    if args.json:
        row = plan.to_dict()["parameters"].get(canonical_name(args.name), {})
        return as_json({"name": args.name, **row, "text": text.splitlines()}), 0
    return text + "\n", 0


def _run_plot(args: argparse.Namespace) -> Output:
    from dist_layerlr.report.heatmap import draw_grid
    from dist_layerlr.report.over_time import draw_over_time
    from dist_layerlr.report.page import write_page

    picture = "lr_grid.png" if args.over_time is None else "lr_over_time.png"
    output = Path(args.output or ("page.html" if args.html else picture))
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
    elif args.over_time is not None:
        steps = fields.integer(1)("--over-time", args.over_time)
        draw_over_time(_plan(args, args.config), output, steps)
    else:
        draw_grid(_plan(args, args.config), output)
    return as_json({"wrote": [str(output)]}) if args.json else f"wrote {output}\n", 0


def _run_diff(args: argparse.Namespace) -> Output:
    lines = plan_diff(
        *(_plan_or_rows(args, source) for source in (args.old, args.new)), every_name=args.names
    )
    if args.json:
        return as_json({"differs": bool(lines), "lines": lines}), int(bool(lines))
    return "".join(f"{line}\n" for line in lines), int(bool(lines))


def _plan_or_rows(args: argparse.Namespace, source: str) -> Plan | Rows:
    # A plan and a JSON config look alike by name: what the file holds decides.
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
