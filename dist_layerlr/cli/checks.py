"""Commands about a machine and other people's scripts: audit, doctor."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dist_layerlr.cli.command import Output, add_command, as_json


def add_to(commands: Any) -> None:
    """Declare them."""
    _add_audit(commands)
    add_command(
        commands,
        "doctor",
        _run_doctor,
        text="say which versions and devices are here, what works with them and what does not",
        examples=["doctor", "doctor --json"],
        statuses={1: "something that is installed does not work"},
    )


def _add_audit(commands: Any) -> None:
    audit = add_command(
        commands,
        "audit",
        _run_audit,
        text="run a training script, unchanged, and say what its optimizers really do",
        examples=[
            "audit -- python train.py --epochs 1",
            "audit --plan plan.json --json audit.json -- torchrun --nproc_per_node 2 train.py",
            "audit --strict --allow decay -- accelerate launch train.py",
        ],
        statuses={
            0: "the script ended with 0, and no fault was found",
            1: "a fault was found",
            4: "no optimizer step was seen",
        },
        more="other: the script's own status, wherever that is not 0",
        takes_json=False,
    )
    add = audit.add_argument
    plan_help = "a plan.json, a folder with one, or a training config: what is to train"
    add("--plan", metavar="FILE", help=plan_help)
    add("--json", metavar="FILE", dest="output", help="write everything that was seen as JSON")
    add("--steps", type=int, default=3, metavar="N", help="steps that are watched (default: 3)")
    add("--names", action="store_true", help="one line per parameter")
    add("--strict", action="store_true", help="warnings count as faults")
    add(
        "--allow",
        action="append",
        default=[],
        metavar="KIND",
        help="a kind of finding that does not count (dead, decay ...); may be repeated",
    )
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="program and arguments")


def _run_audit(args: argparse.Namespace) -> Output:
    from dist_layerlr.audit.run import audit

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    text, status = audit(
        command,
        plan=args.plan,
        output=args.output,
        steps=args.steps,
        strict=args.strict,
        allow=args.allow,
        every_name=args.names,
    )
    # What stands on stdout is the script's alone: it may be piped to where it always goes.
    print(text, file=sys.stderr)
    return "", status


def _run_doctor(args: argparse.Namespace) -> Output:
    from dist_layerlr.cli.doctor import examine, report

    found = examine()
    text = as_json(found.to_dict()) if args.json else report(found)
    return text, int(not found.is_well)
