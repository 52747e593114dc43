"""metrics.jsonl, one row per logged step, and the numbers beside the progress bar."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from dist_layerlr.files import write_text


class MetricsFile:
    """Appends JSON rows; every row is on disk when ``write`` returns."""

    def __init__(self, path: Path, *, first_step: int = 0):
        """Begin anew, or after the rows of the steps before ``first_step``: what was done after it
        is done again.
        """
        kept = [line for line in _lines(path) if _step(line) < first_step] if first_step else []
        write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; JSON has no NaN or infinity, so they become null."""
        valid = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self._file.write(json.dumps(valid, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """Step of a row; infinity for half a row, which a killed run may leave."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the card, or resident in the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**30
