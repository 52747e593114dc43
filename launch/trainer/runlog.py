"""train.log: what the first rank says, with the time, for whoever comes later."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

LOG = "train.log"


def timestamp() -> str:
    """Now, as ISO 8601 with the offset of this machine's time zone."""
    return datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds")


class RunLog:
    """Lines of one process. Until ``open`` they are held, because a refused run writes no files."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._file: TextIO | None = None

    def open(self, path: Path, *, kept: bool) -> None:
        """Write the lines so far, and later ones as they come.

        Args:
            path: Of the file; its folder exists.
            kept: Whether earlier lines stay: the run goes on.

        Raises:
            OSError: no room, no rights.
        """
        self._file = path.open("a" if kept else "w", encoding="utf-8")
        held, self._held = self._held, []
        self._file.write("".join(held))
        self._file.flush()

    def write(self, text: str) -> None:
        """Add a line, or several."""
        lines = "".join(f"{timestamp()} {line}\n" for line in text.splitlines())
        if self._file is None:
            self._held.append(lines)
            return
        # The user has seen the line; a disk that is full is the next checkpoint's to report.
        with suppress(OSError):
            self._file.write(lines)
            self._file.flush()

    def close(self) -> None:
        """Close the file, if it was opened."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()
