"""One run at a time in an output folder, and who it is."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import write_text
from launch.trainer.launcher import ORPHAN_S
from launch.trainer.runlog import timestamp

PATIENCE_S = ORPHAN_S + 10.0
"""How long a start waits for another run in its folder: ranks whose launcher was killed are gone by
then."""
_LOCK, _HOLDER = ".lock", ".lock.holder"
_HELD: dict[Path, FileLock] = {}
"""{output folder: its lock}. Held here because a FileLock lets go when it is collected; the
operating system takes the lock back when the process ends, however it ends."""


def hold(folder: Path, say: Callable[[str], None], patience_s: float | None = None) -> None:
    """Keep a second run out of the folder for as long as this process lives.

    Args:
        folder: The output folder, which exists.
        say: Tells the user what is waited for.
        patience_s: How long to wait for another run's end; None: ``PATIENCE_S``.

    Raises:
        ConfigError: there is one, and it goes on.
        OSError: no room, no rights.
    """
    if folder.resolve() in _HELD:
        return
    patience_s = PATIENCE_S if patience_s is None else patience_s
    # A file of its own: opening the lock empties it, whoever holds it.
    holder = folder / _HOLDER
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(
            f"waiting up to {patience_s:g} s for another run in {str(folder)!r} to end:"
            f" {_who(holder)}"
        )
        try:
            lock.acquire(timeout=patience_s)
        except Timeout:
            raise ConfigError(
                f"Invalid --output-dir {str(folder)!r}: another run is writing to it,"
                f" {_who(holder)}. Wait for it, or choose another folder."
            ) from None
    _HELD[folder.resolve()] = lock
    who = {"pid": os.getpid(), "host": socket.gethostname(), "since": timestamp()}
    write_text(holder, json.dumps(who) + "\n")


def _who(holder: Path) -> str:
    """The run that holds the lock, in words."""
    try:
        found = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which does not say who it is"
