"""The command about the shell: completion."""

from __future__ import annotations

import argparse
from typing import Any

from dist_layerlr.cli.command import Output, add_command
from dist_layerlr.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")
"""Those that shtab writes for."""


def add_to(commands: Any) -> None:
    """Declare it."""
    command = add_command(
        commands,
        "completion",
        _run_completion,
        text="print what makes a shell complete commands and flags",
        examples=[
            "completion bash > ~/.local/share/bash-completion/completions/dist-layerlr",
            'completion zsh > "${fpath[1]}/_dist-layerlr"',
        ],
        takes_json=False,
    )
    command.add_argument("shell", choices=SHELLS, help="whose script is printed")


def _run_completion(args: argparse.Namespace) -> Output:
    try:
        import shtab
    except ModuleNotFoundError:
        raise ConfigError(
            "Cannot write a completion: shtab is not installed."
            " Run: pip install 'dist_layerlr[completion]'"
        ) from None
    # Late, since the program imports this module.
    from dist_layerlr.cli.program import make_parser

    return shtab.complete(make_parser(), shell=args.shell) + "\n", 0
