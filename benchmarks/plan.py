"""How long a plan takes: the 3,510 names of LTX-2 19B, and synthetic models of up to 100,000 names.

    python benchmarks/plan.py

Prints a table and writes benchmarks/results/plan.json. No torch is imported.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

from dist_layerlr import build_plan, read_model

LTX2_NAMES = ROOT / "tests" / "census" / "ltx2_19b.tsv.gz"
LTX2_CONFIG = ROOT / "launch" / "configs" / "ltx2.json"
SUFFIXES = (
    "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k ff.net.0.proj ff.net.2"
    " norm1 norm2".split()
)
SIZES = (12_500, 25_000, 50_000, 100_000)
ROUNDS = 5


def main() -> None:
    """Measure, print, write."""
    ltx2 = [(p.name, p.shape) for p in read_model(LTX2_NAMES)]
    rows = [("ltx2_19b", len(ltx2), measure(ltx2))]
    # Sizes are interleaved, so that a slow moment of the machine hits all of them.
    models = {n: synthetic(n) for n in SIZES}
    times: dict[int, list[float]] = {n: [] for n in SIZES}
    for _ in range(ROUNDS):
        for n, model in models.items():
            times[n].append(once(partial(plan, model)))
    rows += [(f"synthetic {n:,}", n, statistics.median(times[n])) for n in SIZES]
    print(f"{'model':<20}{'names':>10}{'ms':>10}{'us/name':>10}")
    for label, count, seconds in rows:
        print(f"{label:<20}{count:>10,}{seconds * 1e3:>10.1f}{seconds / count * 1e6:>10.1f}")
    growth = rows[-1][2] / rows[1][2] / (SIZES[-1] / SIZES[0])
    print(
        f"time per name at {SIZES[-1]:,} names is {growth:.2f} times that at {SIZES[0]:,} (1.00 is"
        " linear)"
    )
    result = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "rows": [{"model": m, "names": c, "seconds": s} for m, c, s in rows],
        "growth_per_name": growth,
    }
    out = ROOT / "benchmarks" / "results" / "plan.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def plan(model: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Build a plan whole: entries, groups, digest."""
    built = build_plan(model, LTX2_CONFIG)
    assert built.groups and built.digest


def measure(model: Sequence[tuple[str, tuple[int, ...]]]) -> float:
    """Median seconds of one plan."""
    return statistics.median(once(lambda: plan(model)) for _ in range(2 * ROUNDS + 1))


def once(work: Callable[[], None]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def synthetic(count: int) -> list[tuple[str, tuple[int, ...]]]:
    """A model of ``count`` names in blocks of ten."""
    return [
        (f"transformer_blocks.{i}.{s}.weight", (64, 64))
        for i in range(count // len(SUFFIXES))
        for s in SUFFIXES
    ]


if __name__ == "__main__":
    main()
