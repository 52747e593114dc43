"""A recording of steps as a file for Chrome and Perfetto: one line for each queue. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_layerlr.errors import OffloadError

LINES = {"compute": 0, "wait": 1, "copy": 2, "gradients": 3}
"""{kind of work: line}; the names are those of ``meter``."""
_TITLES = ("compute", "compute waits", "copies to the device", "gradients to the host")


def check_path(path: Path) -> None:
    """Refuse a file that cannot be written, before anything is recorded.

    Raises:
        OffloadError: no .json, no folder to write it in, or no rights.
    """
    if path.suffix != ".json":
        raise OffloadError(f"Invalid trace file {str(path)!r}: must end in .json.")
    if not path.parent.is_dir():
        raise OffloadError(
            f"Invalid trace file {str(path)!r}: there is no folder {str(path.parent)!r}. Make it."
        )
    new = not path.exists()
    try:
        # The only question that rights, full disks and read-only mounts all answer.
        path.open("a").close()
        if new:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise OffloadError(
            f"Invalid trace file {str(path)!r}: {error.strerror}. Choose another place."
        ) from None


def write_trace(path: Path, timed: Iterable[Any]) -> None:
    """Write pieces of work (``meter.Timed``) in Chrome's trace format."""
    events: list[dict[str, Any]] = []
    for line, title in enumerate(_TITLES):
        events.append(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": line, "args": {"name": title}}
        )
    for work in sorted(timed, key=lambda work: work.begin):
        if work.seconds <= 0:
            continue
        moved = {"bytes": work.nbytes, "gb_s": work.nbytes / work.seconds / 1e9}
        events.append(
            {
                "ph": "X",
                "name": work.unit,
                "cat": work.kind,
                "pid": 0,
                "tid": LINES[work.kind],
                # Microseconds, as the format has it.
                "ts": work.begin * 1e6,
                "dur": work.seconds * 1e6,
                "args": {"backward": work.backward, **(moved if work.nbytes else {})},
            }
        )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
