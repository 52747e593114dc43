"""What the command lines share: flags, and errors of one line, said once however many ranks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from dist_layerlr.errors import ModelSourceError, error_line
from launch.trainer.launcher import say_once


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and exit with status 2."""
        complain(self.prog, f"{message}; see --help.")
        self.exit(2)


def example(line: str) -> dict[str, Any]:
    """What a parser is made with so that its ``--help`` ends with an example."""
    # Shown as it stands: argparse would fill it into a paragraph.
    form = argparse.RawDescriptionHelpFormatter
    return {"epilog": f"examples:\n  {line}", "formatter_class": form}


def complain(program: str, message: object, *, everywhere: bool = False) -> None:
    """Print one ``error:`` line.

    Args:
        program: The program that reports the error.
        message: Its line breaks become spaces.
        everywhere: This rank prints whatever the others do, with its number in front. Pass True
            for an error that the other ranks do not know of; otherwise all of them call this, and
            the line is printed once on each machine.
    """
    if not everywhere:
        say_once(error_line(program, message))
        return
    rank = os.environ.get("RANK", "0")
    who = f"[rank {rank}] " if rank.isdecimal() and int(rank) > 0 else ""
    # Flushed, because the launcher may kill this process as soon as another rank has left.
    print(error_line(program, f"{who}{message}"), file=sys.stderr, flush=True)


@contextmanager
def blame(subject: str, next_step: str) -> Iterator[None]:
    """Reword any failure inside as one ModelSourceError about a user's file.

    Libraries raise unrelated exception types for one damaged file, so all types are caught.

    Args:
        subject: The file or flag, and what is wrong with it.
        next_step: What the user should do.

    Raises:
        ModelSourceError: The block raised anything.
    """
    try:
        yield
    except Exception as error:
        # Only the first line: some libraries append a whole module or a C++ stack.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelSourceError(f"{subject} ({reason}); {next_step}.") from error


def integer(low: int, *, multiple_of: int = 1) -> Callable[[str], int]:
    """Return an argparse type that accepts the integers >= ``low``.

    Args:
        low: The smallest allowed value.
        multiple_of: Allowed values are multiples of it.
    """
    allowed = f"an integer >= {low}"
    if multiple_of > 1:
        allowed += f" that is a multiple of {multiple_of}"

    def parse(text: str) -> int:
        # isdecimal also refuses a sign, spaces and 1_000, which int() takes.
        number = int(text) if text.isdecimal() else low - 1
        if number < low or number % multiple_of:
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return number

    return parse
