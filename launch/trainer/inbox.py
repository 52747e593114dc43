"""``steer.json`` in the output folder: each is read once, whenever the run is killed.

A file is moved when it is taken up, and moved again when it is in force; the name that it then has
holds the step. Both are renames inside one file system, so that a killed run leaves it under one
name or the other, never under two or none. What a checkpoint does not know yet, the run that goes
on from it reads again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json, sync_folder

STEER = "steer.json"
READ = "steering"
"""Folder of the files that were read."""
_TAKEN = "reading.json"
"""A file between its two moves."""
_NAME = re.compile(r"step_(\d+)(?:\.(\d+))?\.json")
"""Of a file that is in force: after how many steps, and which of several it was."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One file."""

    path: str
    raw: dict[str, Any]
    error: str | None = None
    """Why it could not be read."""
    again: bool = False
    """Whether an earlier process had read it, after the checkpoint that this one began from."""


class Inbox:
    """The files of one run. Only the rank that writes has one."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder, self._read, self._say = folder, folder / READ, say
        self._pending: list[Path] = []
        self._deaf = False

    def begin(self, known: Collection[str], *, continued: bool) -> None:
        """Look for what is left of earlier processes.

        Args:
            known: Names of the files that the checkpoint has in force.
            continued: Whether this is the same run. If not, its files go: it has an end of its own.
        """
        try:
            if continued:
                self._pending = [path for path in self._in_force() if path.name not in known]
                return
            for path in self._in_force():
                path.unlink()
            for path in (self._read / _TAKEN, self._folder / STEER):
                if path.exists():
                    self._say(f"{path} was there before the run: moved, not read")
                    self._read.mkdir(exist_ok=True)
                    path.rename(_free(self._read, "unread"))
        except OSError as error:
            self._stop_reading(error)

    def waiting(self, done: int) -> bool:
        """Whether there is something to read after ``done`` steps."""
        if self._deaf:
            return False
        due = self._pending and _place(self._pending[0])[0] <= done
        return bool(due) or (self._folder / STEER).exists() or (self._read / _TAKEN).exists()

    def take(self, done: int) -> Found | None:
        """Return the next file to read after ``done`` steps; None: there is none."""
        if not self.waiting(done):
            return None
        if self._pending and _place(self._pending[0])[0] <= done:
            return _load(self._pending.pop(0), again=True)
        taken = self._read / _TAKEN
        try:
            # One that a killed process had taken comes first: it is older.
            if not taken.exists():
                self._read.mkdir(exist_ok=True)
                (self._folder / STEER).rename(taken)
        except OSError as error:
            self._stop_reading(error)
            return None
        return _load(taken, again=False)

    def keep(self, found: Found, done: int) -> str:
        """Mark a file as in force since ``done`` steps. Returns the name that it goes by.

        Raises:
            ConfigError: it cannot be marked; a later process would read it again.
        """
        if found.again:
            return Path(found.path).name
        name = _free(self._read, f"step_{done:08d}").name
        try:
            os.rename(found.path, self._read / name)
            # A checkpoint that knows it must not get onto the disk before its name does.
            sync_folder(self._read)
            sync_folder(self._folder)
        except OSError as error:
            raise ConfigError(f"Cannot mark {found.path!r} as read: {error.strerror}.") from None
        return name

    def refuse(self, found: Found, done: int) -> None:
        """Put a bad file aside, so that it is refused once."""
        try:
            os.replace(found.path, _free(self._read, f"refused_{done:08d}"))
        except OSError as error:
            self._stop_reading(error)

    def _in_force(self) -> list[Path]:
        found = [path for path in self._read.glob("step_*.json") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_place)

    def _stop_reading(self, error: OSError) -> None:
        self._deaf = True
        self._say(f"{STEER} is not read any more: {error.strerror}: {str(error.filename)!r}")


def _free(folder: Path, stem: str) -> Path:
    """The first of ``stem.json``, ``stem.1.json``, ... that is not there."""
    path, number = folder / f"{stem}.json", 0
    while path.exists():
        number += 1
        path = folder / f"{stem}.{number}.json"
    return path


def _place(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _load(path: Path, *, again: bool) -> Found:
    try:
        return Found(path=str(path), raw=read_json(path), again=again)
    except ConfigError as error:
        return Found(path=str(path), raw={}, error=str(error), again=again)
