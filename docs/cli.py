"""Write docs/cli.md: every command and flag, from the parsers that read them.

    python docs/cli.py

The test suite compares the page with the parsers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dist_layerlr.cli.command import PROGRAM
from dist_layerlr.cli.program import make_parser
from launch import cache_latents, make_tiny_wan, tiny, train

PAGE = Path(__file__).resolve().parent / "cli.md"
HEAD = """\
# Command line

Written by `python docs/cli.py` from the programs' own parsers. `--help` says the same in a
terminal. `dist-layerlr` comes with the package; the programs of `launch/` are in the checkout.
"""
EXAMPLES, STATUSES = "examples:", "exit status:"


def page() -> str:
    """The whole page."""
    text = HEAD
    for title, parser in programs().items():
        text += f"\n## {title}\n\n{section(parser)}"
    return text


def programs() -> dict[str, argparse.ArgumentParser]:
    """Every parser by how its program is called, commands after the program that has them."""
    whole = make_parser()
    return {
        PROGRAM: whole,
        **{f"{PROGRAM} {name}": parser for name, parser in commands(whole)},
        "launch/train.py": train.make_parser(),
        "launch/cache_latents.py": cache_latents.make_parser(),
        "launch/tiny.py": tiny.make_parser(),
        "launch/make_tiny_wan.py": make_tiny_wan.make_parser(),
    }


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of each command."""
    for action in parser._actions:
        # argparse has no public way to ask a parser for its commands.
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def section(parser: argparse.ArgumentParser) -> str:
    """What one parser takes, as Markdown."""
    text = "".join(_paragraph(part) for part in (parser.description or "").strip().split("\n\n"))
    actions = [a for a in parser._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
    rows = [row for action in actions if (row := _row(action))]
    if rows:
        text += "| argument | value | default | meaning |\n|---|---|---|---|\n"
        text += "\n".join(rows) + "\n\n"
    statuses, _, examples = (parser.epilog or "").partition(EXAMPLES)
    if STATUSES in statuses:
        text += "Exit status:\n\n"
        for line in filter(None, statuses.partition(STATUSES)[2].splitlines()):
            first, _, meaning = line.strip().partition("  ")
            text += f"- `{first}`: {_cell(meaning)}\n" if meaning else f"- {_cell(first)}\n"
        text += "\n"
    if examples:
        lines = [line.strip() for line in examples.splitlines() if line.strip()]
        text += "```bash\n" + "\n".join(lines) + "\n```\n"
    return text.rstrip("\n") + "\n"


def _paragraph(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("    ") for line in lines):
        return "```bash\n" + "".join(f"{line[4:]}\n" for line in lines) + "```\n\n"
    return "\n".join(lines).replace("``", "`") + "\n\n"


def _row(action: argparse.Action) -> str | None:
    if isinstance(action, argparse._SubParsersAction):
        return None
    names = ", ".join(f"`{name}`" for name in action.option_strings)
    # What stands without a flag is known by the word that its usage shows.
    shown = action.metavar if isinstance(action.metavar, str) else action.dest
    flag = action.nargs == 0
    value = "" if flag or not action.option_strings else f"`{shown.upper()}`"
    if action.choices is not None:
        value = ", ".join(f"`{choice}`" for choice in action.choices)
    default = "" if flag or action.default in (None, []) else f"`{action.default}`"
    if action.required and action.option_strings:
        default = "required"
    return f"| {names or f'`{shown}`'} | {value} | {default} | {_cell(action.help or '')} |"


def _cell(text: str) -> str:
    """Text in a table: a column's sign and what looks like HTML or emphasis is not."""
    flat = " ".join(text.split()).replace("%%", "%")
    for sign, written in (("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("*", "\\*")):
        flat = flat.replace(sign, written)
    return flat


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
