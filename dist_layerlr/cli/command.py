"""What all commands share: how they are declared, and what they hand back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PROGRAM = "dist-layerlr"
MODEL_HELP = (
    "a .safetensors file, a checkpoint folder, or a tsv of name<TAB>shape (.gz too; - reads stdin)"
)
RUN_HELP = f"with --html, the folder of a run; or a model: {MODEL_HELP}"
BASE_HELP = "the full model, when MODEL lists an adapter only"
CONFIG_HELP = "training config (JSON, YAML or TOML, told by the file's name)"
STATUSES = {0: "done", 2: "an error, said in one line", 3: "a defect of this program"}
OWN_STATUSES = {
    1: "diff: something differs; audit: a fault; advise: a change is proposed; doctor: a defect",
    4: "audit: no optimizer step was seen; advise: too few rows to say anything",
}
"""What some commands end with beside them, in the words of the program's own ``--help``."""
Output = tuple[str, int]
"""(text for stdout, exit status)."""
Run = Callable[[argparse.Namespace], Output]


def add_command(
    commands: Any,
    name: str,
    run: Run,
    *,
    text: str,
    examples: Sequence[str],
    statuses: Mapping[int, str] | None = None,
    more: str = "",
    takes_json: bool = True,
) -> argparse.ArgumentParser:
    """Declare a command, with its examples and exit statuses in its ``--help``.

    Args:
        commands: the subparsers.
        name: of the command.
        run: what it does.
        text: what it is for, one sentence without a full stop.
        examples: whole command lines, after ``dist-layerlr``.
        statuses: beside those that all commands share.
        more: one line under the statuses.
        takes_json: whether ``--json`` is a plain flag; else the command declares its own.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=help_tail(examples=examples, statuses={**STATUSES, **(statuses or {})}, more=more),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if takes_json:
        parser.add_argument("--json", action="store_true", help="write JSON instead of text")
    parser.set_defaults(run=run)
    return parser


def help_tail(*, examples: Sequence[str], statuses: Mapping[int, str], more: str = "") -> str:
    """How every ``--help`` ends: exit statuses, and examples last, where a terminal shows them.

    Args:
        examples: whole command lines, after ``dist-layerlr``.
        statuses: {status: meaning}.
        more: one line under the statuses.
    """
    # Shown as they stand: argparse would fill them into a paragraph.
    lines = ["exit status:"]
    lines += [f"  {status}  {meaning}" for status, meaning in sorted(statuses.items())]
    lines += [f"  {more}"] if more else []
    return "\n".join([*lines, "", "examples:", *(f"  {PROGRAM} {one}" for one in examples)])


def as_json(value: Any) -> str:
    """JSON as every command writes it."""
    return json.dumps(value, indent=1) + "\n"
