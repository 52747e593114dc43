"""metrics.jsonl, one row per logged step, and the numbers beside the progress bar."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import write_text
from dist_layerlr.optim import Reading
from launch.trainer.trackers import Trackers

_IDENTIFIERS = ("step", "network")
"""Keys of a row that are no curve."""


class MetricsFile:
    """Appends JSON rows; every row has left this process when ``write`` returns."""

    def __init__(self, path: Path, *, first_step: int = 0, trackers: Trackers | None = None):
        """Begin a new file, or continue one after the rows of the steps before ``first_step``.

        Later rows are dropped: a resumed run does those steps again.

        Args:
            path: Of the file.
            first_step: The first one that is still to be done.
            trackers: They are told every row too.
        """
        self._trackers = trackers
        kept = ""
        if first_step:
            for line in _lines(path):
                if _step(line) < first_step:
                    kept += line + "\n"
        write_text(path, kept)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. JSON has no NaN or infinity, so they become null.

        Raises:
            ConfigError: it cannot be written.
        """
        valid: dict[str, Any] = {}
        for key, value in row.items():
            if isinstance(value, Reading):
                valid[key] = value.rows()
                continue
            unwritable = isinstance(value, float) and not math.isfinite(value)
            valid[key] = None if unwritable else value
        try:
            self._file.write(json.dumps(valid, allow_nan=False) + "\n")
            # A run that is killed must not lose the rows before; half a row is skipped on resume.
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"Cannot write {self._file.name!r}: {error.strerror}. Make room, and go on with"
                " --resume latest."
            ) from None

        if self._trackers is not None:
            self._trackers.log(_curves(row), row["step"])

    def close(self) -> None:
        """Close the file, and the runs of the trackers."""
        self._file.close()
        if self._trackers is not None:
            self._trackers.close()


def _curves(row: dict[str, Any]) -> dict[str, float]:
    """What of a row trackers draw: its numbers, and a few curves for each component."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Reading):
            found |= value.curves()
        elif isinstance(value, (int, float)) and key not in _IDENTIFIERS:
            found[key] = value
    before = f"{row['network']}/" if "network" in row else ""
    return {f"{before}{key}": value for key, value in found.items()}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """Step of a row; infinity for half a row, which a killed run may leave."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the card, or resident in this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        # Windows has no `resource` module; accelerate depends on psutil.
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
