"""Command lines as the pages show them, read by the parsers of the programs that they start."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from collections.abc import Callable, Sequence

from dist_layerlr.cli.program import make_parser
from launch import cache_latents, make_tiny_wan, tiny, train
from tests.support.pages import ROOT

SCRIPTS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "launch/train.py": train.make_parser,
    "launch/cache_latents.py": cache_latents.make_parser,
    "launch/tiny.py": tiny.make_parser,
    "launch/make_tiny_wan.py": make_tiny_wan.make_parser,
}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_.]*|\.\.\.")
"""A word in capitals stands for the reader's own."""


def check(line: str) -> None:
    """Fail unless the program is there and takes every word of a command line."""
    words = shlex.split(line, comments=True)
    # `NAME=value` in front is the command's environment; what follows `>` is the shell's.
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    words = words[: words.index(">")] if ">" in words else words
    program, *arguments = words
    if program not in PROGRAMS:
        raise AssertionError(f"no parser is known for {program!r}: {line}")
    PROGRAMS[program](arguments)
    for word in arguments:
        # A file of this repository that a command names is there.
        if re.match(r"(launch|ds_configs|tests|benchmarks|requirements|docs)/", word):
            assert (ROOT / word).exists(), f"{word}: {line}"


def read_by(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """What a parser makes of words; a failure of the test where it refuses them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args([*arguments])
    except SystemExit as error:
        # --help and --version are commands as well.
        if error.code in (0, None):
            return argparse.Namespace()
        raise AssertionError(f"{shlex.join(arguments)}: {said.getvalue()}") from None


def flags_of(line: str) -> list[str]:
    """The flags of a command in running text that its program does not have.

    What is required may be left out there, and a word in capitals may stand for a number.
    """
    program, *arguments = shlex.split(line.replace("...", ""), comments=True)
    parser: argparse.ArgumentParser | None = None
    if program == "dist-layerlr":
        parser = make_parser()
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if arguments and not arguments[0].startswith("-"):
            if arguments[0] not in commands.choices:
                return [arguments[0]]
            parser = commands.choices[arguments[0]]
    else:
        script = next((word for word in arguments if word in SCRIPTS), None)
        if script is not None:
            parser = SCRIPTS[script]()
            arguments = arguments[arguments.index(script) + 1 :]
    if parser is None:
        return []
    # What follows `--` are the words of another program.
    arguments = arguments[: arguments.index("--")] if "--" in arguments else arguments
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    return [flag for flag in flags if flag not in parser._option_string_actions]


def _python(arguments: list[str]) -> None:
    script, *rest = arguments
    if script == "-":
        return  # a program of the page itself, which is run where its block is taken
    if script in SCRIPTS:
        read_by(SCRIPTS[script](), rest)
    else:
        assert (ROOT / script).is_file(), script


def _ours(arguments: list[str]) -> None:
    read_by(make_parser(), arguments)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    found = read_by(get_args_parser(), arguments)
    _python([found.training_script, *found.training_script_args])


def _deepspeed(arguments: list[str]) -> None:
    from deepspeed.launcher import runner

    found = runner.parse_args(arguments)
    _python([found.user_script, *found.user_args])


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch", arguments
    found = read_by(launch_command_parser(), arguments[1:])
    _python([found.training_script, *found.training_script_args])


def _bash(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file(), arguments


def _make(arguments: list[str]) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert arguments[0] in targets, arguments


def _anything(arguments: list[str]) -> None:
    """Programs of others whose arguments nothing here reads."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "dist-layerlr": _ours,
    "python": _python,
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "accelerate": _accelerate,
    "bash": _bash,
    "make": _make,
    "source": _anything,
    ".venv-test/bin/pre-commit": _anything,
}
