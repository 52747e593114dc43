"""``dist-layerlr``: what a config, streaming, a checkpoint or a training script does to a model.

Commands: plan, explain, plot, predict, diff, export, audit, convert, schema, doctor, advise,
completion.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dist_layerlr.cli import checks, completion, exchange, outputs, plans, runs
from dist_layerlr.cli.command import OWN_STATUSES, PROGRAM, STATUSES, help_tail
from dist_layerlr.errors import LayerLRError, error_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns 0; 1 where ``diff`` found a difference, ``audit`` a fault or ``advise`` something to
    change; 2 after a one-line error; 3 after a traceback; for ``advise`` and ``audit`` also 4; for
    ``audit`` also the script's own status.
    """
    args = make_parser().parse_args(argv)
    status = 0
    try:
        output, status = args.run(args)
        sys.stdout.write(output)
        sys.stdout.flush()
    except LayerLRError as error:
        print(error_line(PROGRAM, error), file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
    except OSError as error:
        print(error_line(PROGRAM, f"cannot write the output: {error.strerror}"), file=sys.stderr)
        return 2
    except Exception:
        # Python would end with status 1, which a script reads as "the plans differ".
        traceback.print_exc()
        return 3
    return status


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument as every other error: in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments and exit with status 2."""
        # The commands are of this class too: subparsers take that of their parent.
        print(error_line(PROGRAM, f"{message}; see {self.prog} --help."), file=sys.stderr)
        self.exit(2)


def make_parser() -> argparse.ArgumentParser:
    """Every command with its flags: what ``main`` reads, and docs/cli.md and completions list."""
    parser = _Parser(
        prog=PROGRAM,
        description=__doc__,
        epilog=help_tail(
            examples=["plan model.safetensors --config config.json", "plan --help"],
            statuses={**STATUSES, **OWN_STATUSES},
            more="COMMAND --help says which of them a command ends with.",
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Here, since the package's own module is no part of what the commands load.
    from dist_layerlr import __version__

    version = f"{PROGRAM} {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (plans, outputs, checks, exchange, runs, completion):
        module.add_to(commands)
    return parser
