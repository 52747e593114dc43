"""What the command lines share: every error is one line, said once however many ranks there are."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and exit with status 2."""
        complain(self.prog, f"{message}; see --help.")
        self.exit(2)


def complain(program: str, message: object, *, everywhere: bool = False) -> None:
    """Print one ``error:`` line.

    Args:
        program: what speaks.
        message: line breaks become spaces.
        everywhere: other ranks than the first speak too and say who they are: the others do not
            know of the error.
    """
    rank = os.environ.get("RANK", "0")
    first = not rank.isdecimal() or int(rank) == 0
    if first or everywhere:
        who = "" if first else f"[rank {rank}] "
        print(
            f"{program}: error: {who}{' '.join(str(message).split())}", file=sys.stderr, flush=True
        )
