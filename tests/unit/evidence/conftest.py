"""The benchmarks import each other by file name; so do these tests."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = str(Path(__file__).resolve().parents[3] / "benchmarks")
if BENCHMARKS not in sys.path:
    # At the end: a benchmark's name must not hide a package.
    sys.path.append(BENCHMARKS)
