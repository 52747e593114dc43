"""metrics.jsonl, one row per logged step, and the numbers beside the progress bar."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch


class MetricsFile:
    """Appends JSON rows; every row is on disk when ``write`` returns."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; JSON has no NaN or infinity, so they become null."""
        valid = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(valid, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the card, or resident in the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 2**30
