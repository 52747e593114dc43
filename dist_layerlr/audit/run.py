"""Runs a command under audit, and judges what its ranks have written. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import dist_layerlr
from dist_layerlr import fields
from dist_layerlr.audit.bootstrap import FOLDER, STEPS
from dist_layerlr.audit.findings import FAULTS, KINDS, Finding, find
from dist_layerlr.audit.merge import Seen, nothing, read_reports
from dist_layerlr.audit.table import report, to_dict
from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_config, write_json
from dist_layerlr.plan.build import build_plan
from dist_layerlr.plan.diff import Rows, read_rows
from dist_layerlr.plan.entries import Plan

NOTHING_SEEN = 4
"""Exit status where no optimizer step was seen."""
_SITE = """import sys
sys.path.append({root!r})
from dist_layerlr.audit.bootstrap import start
start({folder!r})
"""
"""The audit's ``sitecustomize``. The package stands last on the path: it shadows nothing."""


def audit(
    command: Sequence[str],
    *,
    plan: str | None = None,
    output: str | None = None,
    steps: int = 3,
    strict: bool = False,
    allow: Sequence[str] = (),
    every_name: bool = False,
) -> tuple[str, int]:
    """Run a command, and report what its optimizers did.

    Args:
        command: program and arguments.
        plan: a plan.json, a folder with one, or a training config, to compare with.
        output: JSON file to write.
        steps: optimizer steps that are watched, at least one.
        strict: count warnings as faults.
        allow: kinds that do not count.
        every_name: one line per name instead of one for names that train alike.

    Returns:
        (report, exit status): the script's own where it is not 0; else 1 for faults, 4 where no
        step was seen, 0.

    Raises:
        ConfigError: no command, a bad option, or a plan that cannot be read.
    """
    if not command:
        raise ConfigError("Nothing to audit: give a command after --, such as -- python train.py.")
    for kind in allow:
        if kind not in KINDS:
            hint = fields.suggestion(kind, KINDS)
            raise ConfigError(f"Invalid --allow {kind!r}: must be one of {', '.join(KINDS)}.{hint}")
    # Before the command: a misspelt path must not cost a training run.
    wanted = None if plan is None else _read_plan(plan)
    if steps < 1:
        raise fields.invalid("--steps", steps, "an integer >= 1")
    if output is not None:
        _check_output(Path(output))
    with tempfile.TemporaryDirectory(prefix="dist-layerlr-audit-") as folder:
        status = _run(command, _environment(folder, steps))
        seen = read_reports(Path(folder))
    found = [] if seen is None else find(seen, _planned(wanted, seen))
    if output is not None:
        # Also where nothing was seen: a program must not read what an earlier audit left there.
        write_json(Path(output), to_dict(seen or nothing(), found, status))
    if seen is None:
        how = f"the command ended with status {status}, and " if status else ""
        text = (
            f"[audit] {how}no optimizer step was seen. The command must run torch in a Python that"
            " reads PYTHONPATH (not python -I or -E), on this machine, and reach a step at a rate"
            " above 0"
        )
        return text, status or NOTHING_SEEN
    text = report(seen, found, every_name=every_name)
    return text, status or _judged(seen, found, strict, allow)


def _check_output(path: Path) -> None:
    """Before the command, which may run for hours.

    Raises:
        ConfigError: no file can be written there.
    """
    folder = path.resolve().parent
    if not folder.is_dir():
        why = "its folder does not exist. Make it first"
    elif path.is_dir():
        why = "it is a folder. Name a file in it"
    elif not os.access(folder, os.W_OK):
        why = "its folder cannot be written to. Name another one"
    else:
        return
    raise ConfigError(f"Invalid --json {str(path)!r}: {why}.")


def _judged(seen: Seen, found: Sequence[Finding], strict: bool, allow: Sequence[str]) -> int:
    # Only faults of the audit itself were written.
    if not seen.ranks:
        return NOTHING_SEEN
    counted = {one.kind for one in found} - set(allow)
    return int(bool(counted if strict else counted & FAULTS.keys()))


def _read_plan(source: str) -> Rows | str:
    """Rows of a plan; a config is checked now, and planned once the model is known."""
    rows = read_rows(source)
    if rows is None:
        read_config(source)
        return source
    return rows


def _planned(wanted: Rows | str | None, seen: Seen) -> Plan | Rows | None:
    if not isinstance(wanted, str):
        return wanted
    return build_plan(seen.infos(), wanted) if seen.parameters else None


def _environment(folder: str, steps: int) -> Mapping[str, str]:
    """Of the command: its Python processes begin with our ``sitecustomize``."""
    root = str(Path(dist_layerlr.__file__).resolve().parents[1])
    site = _SITE.format(root=root, folder=folder)
    Path(folder, "sitecustomize.py").write_text(site, encoding="utf-8")
    # In front, so that it is found before the one of the distribution, which it then runs.
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, FOLDER: folder, STEPS: str(steps)}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command with our own standard streams; its exit status as a shell gives it."""
    try:
        # Its streams are ours: what it prints must not depend on who looks on.
        process = subprocess.Popen(list(command), env=environment)
    except OSError as error:
        raise ConfigError(
            f"Cannot run {command[0]!r}: {error.strerror}. Give a program after --, such as"
            f" -- {Path(sys.executable).name} train.py."
        ) from None
    with _signals_to(process):
        status = process.wait()
    return 128 - status if status < 0 else status


@contextmanager
def _signals_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let the command decide what a signal means, and outlive it: it may save a checkpoint."""

    def send(number: int, _: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the whole group, the command among it.
        if number != signal.SIGINT:
            process.send_signal(number)

    before = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
