"""What streaming costs: ours, the resident model and others, beside what ``predict`` says.

    python benchmarks/streaming.py    # CUDA: 14B in blocks of Wan's size, LoRA; about 40 minutes
    python benchmarks/streaming.py --arms resident window1 --tokens 512 4096
    python benchmarks/streaming.py --exact --tokens 512    # CUDA: losses bitwise
    python benchmarks/streaming.py --device cpu            # about 2 minutes on 2 cores

Without CUDA both speeds are set: a worker thread copies at a bandwidth, blocks compute at a number
of operations per second (they wait for what is left of their time). So ``predict`` has nothing to
fit: every arm must come within TOLERANCE of its floor, the resident one of its compute, and the one
that waits for each copy of the sum of both.

Rows are kept by arm and token count in benchmarks/results/streaming_<device>.json, written after
every arm; a run with --arms or --tokens replaces its own rows only. The plot beside it shows step
time over tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from dist_layerlr.offload import measure
from dist_layerlr.offload.device import Immediate
from dist_layerlr.offload.predict import predict
from dist_layerlr.offload.prediction import GB, Layout, Machine, Prediction, Workload
from streaming_arms import ROWS, SMALL, WAN_14B, Arm, Size, builders, kernels, ours

RESULTS = ROOT / "benchmarks" / "results"
TOLERANCE = 0.2
"""Relative, of the fastest step. Without overlap a step is 1.4 to 1.6 times as long. A CPU that
computes does not run ahead and ask for copies, so they start up to two blocks late."""
assert SMALL.flops is not None
CPU = Machine(gb_s=0.125, copy_us=500, tflops=SMALL.flops / 1e12)
"""Blocks of 4.2 MB take 34 ms; 192 tokens compute as long."""
Row = dict[str, Any]


class SimulatedLink(Immediate):
    """The CPU, with copies that a worker thread makes in order, each at the bandwidth and fixed
    time of a machine.
    """

    def __init__(self, machine: Machine, *, overlap: bool = True):
        super().__init__(torch.device("cpu"))
        self._machine, self._overlap = machine, overlap
        self._worker = ThreadPoolExecutor(1)
        self._free_at = 0.0

    def upload(
        self, target: Tensor, source: Tensor, after: Any, then: Callable[[], None] | None
    ) -> threading.Event:
        """Queue a copy.

        Compute before ``after`` is done: on the CPU it is done when it is asked for.
        """
        ready = threading.Event()
        begin = max(self._free_at, time.perf_counter())
        self._free_at = (
            begin + source.nbytes / (self._machine.gb_s * GB) + self._machine.copy_us * 1e-6
        )
        self._worker.submit(self._copy, target, source, then, self._free_at).add_done_callback(
            lambda _: ready.set()
        )
        if not self._overlap:
            ready.wait()
        return ready

    def wait(self, ready: threading.Event) -> bool:
        """Make compute wait."""
        late = not ready.is_set()
        ready.wait()
        return late

    def _copy(
        self, target: Tensor, source: Tensor, then: Callable[[], None] | None, end: float
    ) -> None:
        target.copy_(source)
        if then is not None:
            then()
        time.sleep(max(0.0, end - time.perf_counter()))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured where."""

    device: torch.device
    size: Size
    tokens: tuple[int, ...]
    rounds: int
    warmup: int
    exact: bool
    machine: Machine
    """On CUDA as measured in step 0: a matrix product, not a model."""

    @property
    def cuda(self) -> bool:
        """Whether the link is real."""
        return self.device.type == "cuda"

    def arms(self) -> dict[str, Callable[[], Arm]]:
        """{key: builder}."""
        if self.cuda:
            return builders(self.size, self.device)
        link, slow = (SimulatedLink(self.machine, overlap=overlap) for overlap in (True, False))
        return {
            "resident": builders(self.size, self.device)["resident"],
            "window1": lambda: ours(self.size, link),
            "window2": lambda: ours(self.size, link, window=2),
            "share0.50": lambda: ours(self.size, link, share=0.5),
            "serial": lambda: ours(self.size, slow, overlap=False),
        }

    def batch(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, text, target: the same for every arm."""
        generator = torch.Generator().manual_seed(tokens)
        rows = ROWS if self.size.flops is not None else tokens
        shapes = ((1, rows), (1, self.size.text), (1, rows))
        made = [torch.randn(*shape, self.size.width, generator=generator) for shape in shapes]
        x, text, target = (t.to(self.device, self.size.dtype) for t in made)
        return x, text, target


def measure_arms(bench: Bench, arms: list[Arm], tokens: int) -> list[Row]:
    """Step the arms in turn, so that a slow moment of the machine hits all of them."""
    batch = bench.batch(tokens)
    times: list[list[float]] = [[] for _ in arms]
    losses: list[list[float]] = [[] for _ in arms]
    for arm in arms:
        arm.reset(tokens)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    for i in range(bench.warmup + bench.rounds):
        for k, arm in enumerate(arms):
            if i == bench.warmup and arm.handle is not None:
                arm.handle.stats()
            _wait(bench.device)
            start = time.perf_counter()
            losses[k].append(arm.step(*batch))
            _wait(bench.device)
            if i >= bench.warmup:
                times[k].append(time.perf_counter() - start)
    return [
        _row(bench, arm, tokens, t, seen) for arm, t, seen in zip(arms, times, losses, strict=True)
    ]


def _row(bench: Bench, arm: Arm, tokens: int, times: list[float], losses: list[float]) -> Row:
    row: Row = {
        "arm": arm.label,
        "tokens": tokens,
        "exact": bench.exact,
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "losses": losses,
        "peak_gb": torch.cuda.max_memory_allocated() / GB if bench.cuda else None,
        "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB,
    }
    if arm.handle is not None:
        recent = arm.handle.stats().recent
        row |= {
            "h2d_gb": recent.h2d_bytes / GB / bench.rounds,
            "fetches": recent.fetches / bench.rounds,
            "stalls": recent.stalls / bench.rounds,
            "gb_s": recent.h2d_bytes / GB / sum(times),
        }
    return row


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What ``predict`` needs to know of an arm of ours."""

    layout: Layout
    window: int
    overlaps: bool


def add_predictions(bench: Bench, rows: list[Row], streamed: dict[str, Streamed]) -> None:
    """Compare losses with the resident arm's, and times with the prediction."""
    measured = [r for r in rows if "min_s" in r and r["exact"] == bench.exact]
    resident = {r["tokens"]: r for r in measured if r["arm"] == "resident"}
    for row in measured:
        base = resident.get(row["tokens"])
        if base is None:
            continue
        row["loss_equal"] = row["losses"] == base["losses"]
        if row["arm"] in streamed:
            arm = streamed[row["arm"]]
            found = predict_step(bench, arm, row["tokens"], base["min_s"])
            row |= {
                "compute_s": found.compute_s,
                "transfer_s": found.transfer_s,
                "hidden": found.hidden,
                "predicted_s": found.step_s if arm.overlaps else found.serial_s,
                "predicted_fetches": found.fetches,
            }
            if not bench.cuda:
                base["predicted_s"] = found.compute_s


def predict_step(bench: Bench, arm: Streamed, tokens: int, resident_s: float) -> Prediction:
    """From the set speeds on the CPU; on CUDA, from the compute that the resident model took."""
    work, machine = Workload(tokens=tokens), bench.machine
    if bench.cuda:
        flop = predict(arm.layout, work, replace(machine, tflops=1.0), window=arm.window).compute_s
        machine = replace(machine, tflops=flop / resident_s)
    return predict(arm.layout, work, machine, window=arm.window)


def run(bench: Bench, keys: list[str], out: Path) -> list[Row]:
    """Measure arm by arm; on the CPU all at once, where they are small and the machine is noisy."""
    build = bench.arms()
    rows, streamed = _read(out), {}
    for group in [[key] for key in keys] if bench.cuda else [keys]:
        arms = [build[key]() for key in group]
        for arm in arms:
            if arm.handle is not None:
                layout = Layout(units=arm.handle.units, fixed_bytes=0, width=bench.size.width)
                streamed[arm.label] = Streamed(
                    layout=layout, window=arm.window, overlaps=arm.overlaps
                )
        for tokens in bench.tokens:
            try:
                made = measure_arms(bench, arms, tokens)
            except Exception as error:  # out of memory, or a library that cannot train this way
                if not bench.cuda:
                    raise
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                made = [
                    {"arm": a.label, "tokens": tokens, "exact": bench.exact, "error": reason}
                    for a in arms
                ]
            kept = {(r["arm"], r["tokens"], r["exact"]) for r in made}
            rows = [r for r in rows if (r["arm"], r["tokens"], r["exact"]) not in kept] + made
            add_predictions(bench, rows, streamed)
            for row in rows[-len(made) :]:
                print(_line(row), flush=True)
        for arm in arms:
            arm.stop()
        _write(out, bench, rows)
    return rows


COLUMNS = {
    "tokens": 7,
    "step ms": 10,
    "predicted": 11,
    "ratio": 7,
    "compute": 9,
    "link": 9,
    "stalls": 8,
    "GB": 6,
}
HEADER = f"{'arm':<30}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def _line(row: Row) -> str:
    if "error" in row:
        return f"{row['arm']:<30}{row['tokens']:>7}  {row['error'][:80]}"
    text = f"{row['arm']:<30}{row['tokens']:>7}{row['min_s'] * 1e3:>10.1f}"
    if "predicted_s" in row:
        text += f"{row['predicted_s'] * 1e3:>11.1f}{row['min_s'] / row['predicted_s']:>7.2f}"
    if "compute_s" in row:
        text += (
            f"{row['compute_s'] * 1e3:>9.1f}{row['transfer_s'] * 1e3:>9.1f}{row['stalls']:>8.1f}"
        )
        text += f"{row['peak_gb']:>6.1f}" if row["peak_gb"] is not None else ""
    return text + (
        "" if row.get("loss_equal", True) else "   losses differ from the resident run's"
    )


def verdicts(bench: Bench, rows: list[Row]) -> list[tuple[bool, str]]:
    """What must hold, and whether it does."""
    ours_rows = [r for r in rows if "predicted_fetches" in r and r["exact"] == bench.exact]
    if not bench.cuda or bench.exact:
        same = [r for r in ours_rows if r["loss_equal"]]
        found = [
            (
                same == ours_rows,
                f"losses bitwise equal to the resident run in {len(same)} of {len(ours_rows)} rows",
            )
        ]
        if bench.cuda:
            return found
        off = [r["min_s"] / r["predicted_s"] - 1 for r in rows if "predicted_s" in r]
        near = [abs(x) <= TOLERANCE for x in off]
        counted = [r["fetches"] == r["predicted_fetches"] for r in ours_rows]
        return [
            *found,
            (all(counted), f"as many copies as predicted in {sum(counted)} of {len(counted)} rows"),
            (
                all(near),
                (
                    f"step within {TOLERANCE:.0%} of the prediction in {sum(near)} of {len(near)}"
                    f" rows (off by {min(off):+.1%} to {max(off):+.1%})"
                ),
            ),
        ]
    streamed = [r for r in ours_rows if r["arm"].startswith("ours W=") and "," not in r["arm"]]
    wide = [r for r in streamed if r["hidden"] and r["compute_s"] >= 1.5 * r["transfer_s"]]
    narrow = [r for r in streamed if r["transfer_s"] >= 1.5 * r["compute_s"]]
    resident = {
        r["tokens"]: r["median_s"] for r in rows if r["arm"] == "resident" and "median_s" in r
    }
    slow = [r["median_s"] / resident[r["tokens"]] - 1 for r in wide]
    full = [r["gb_s"] / bench.machine.gb_s for r in narrow]
    best = {
        t: min(r["median_s"] for r in streamed if r["tokens"] == t)
        for t in {r["tokens"] for r in streamed}
    }
    others = [
        r
        for r in rows
        if "min_s" in r and r["arm"] != "resident" and not r["arm"].startswith("ours")
    ]
    beaten = [best[r["tokens"]] <= r["median_s"] for r in others if r["tokens"] in best]
    return [
        (
            all(x <= 0.03 for x in slow),
            f"slower than resident by at most 3% where the link is hidden: {_span(slow)}",
        ),
        (
            all(x >= 0.9 for x in full),
            f"at least 90% of the link's peak where it is not: {_span(full)}",
        ),
        (all(beaten), f"faster than every other way in {sum(beaten)} of {len(beaten)} rows"),
    ]


def _span(values: list[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}" if values else "no such row"


def draw(bench: Bench, rows: list[Row], path: Path) -> None:
    """Step time over tokens, one line per arm, and the floor of ours with one unit ahead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(8, 5))
    good = sorted(
        (r for r in rows if "min_s" in r and r["exact"] == bench.exact), key=lambda r: r["tokens"]
    )
    for label in dict.fromkeys(
        r["arm"] for r in sorted(good, key=lambda r: r["arm"] != "resident")
    ):
        line = [r for r in good if r["arm"] == label]
        axes.plot(
            [r["tokens"] for r in line],
            [r["median_s"] for r in line],
            marker="o",
            markersize=4,
            label=label,
        )
    floor = [r for r in good if r["arm"] == "ours W=1" and "compute_s" in r]
    axes.plot(
        [r["tokens"] for r in floor],
        [max(r["compute_s"], r["transfer_s"]) for r in floor],
        "k--",
        linewidth=1,
        label="max(compute, bytes / bandwidth)",
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens per step", ylabel="seconds per step")
    axes.set_title(
        f"{bench.size.blocks} blocks of width {bench.size.width}, LoRA; link"
        f" {bench.machine.gb_s:.3g} GB/s"
    )
    axes.set_xticks(bench.tokens, [f"{t:,}" for t in bench.tokens])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measure_link(device: torch.device, size: Size) -> Machine:
    """Step 0: the link both ways, pinned and pageable, and a matrix product of the block's
    shape.
    """
    found = {
        f"{name}_{megabytes}mb_gb_s": measure.link_gb_s(device, megabytes=megabytes, **kind)
        for megabytes in (64, 256, 1024)
        for name, kind in (
            ("pinned", {}),
            ("pageable", {"pinned": False}),
            ("back", {"back": True}),
        )
    }
    found["both_ways_gb_s"] = both_ways_gb_s(device)
    found["tflops"] = measure.gemm_tflops(device, tokens=8192, width=size.width, dtype=size.dtype)
    machine = Machine(gb_s=found["pinned_1024mb_gb_s"], tflops=found["tflops"])
    t_star = torch.finfo(size.dtype).bits / 8 * machine.tflops * 1e12 / (2 * machine.gb_s * GB)
    print(
        ", ".join(f"{k} {v:.1f}" for k, v in found.items()), f"-> hidden from {t_star:,.0f} tokens"
    )
    return machine


def both_ways_gb_s(device: torch.device, *, megabytes: int = 256) -> float:
    """Sum of both directions of the link, copied at once on two streams."""
    size = megabytes << 20
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def copy() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(there[1], non_blocking=True)

    # Timer waits for the device in front of and behind every run.
    return 2 * size / GB / Timer("copy()", globals={"copy": copy}).timeit(5).median


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _read(out: Path) -> list[Row]:
    return list(json.loads(out.read_text())["rows"]) if out.exists() else []


def _write(out: Path, bench: Bench, rows: list[Row]) -> None:
    name = (
        torch.cuda.get_device_name(bench.device)
        if bench.cuda
        else f"{platform.machine()}, simulated link"
    )
    result = {
        "device": name,
        "torch": torch.__version__,
        "link_gb_s": bench.machine.gb_s,
        "copy_us": bench.machine.copy_us,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(
        json.dumps({**result, "blocks": bench.size.blocks, "rows": rows}, indent=1) + "\n"
    )


def main() -> int:
    """Measure, print, write, draw, judge. Returns 1 when something that must hold does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument(
        "--arms", nargs="+", metavar="ARM", help="some of them only; resident comes first"
    )
    parser.add_argument("--tokens", nargs="+", type=int, help="some token counts only")
    parser.add_argument(
        "--rounds", type=int, help="measured steps per arm (default: 10 on CUDA, 5 on the CPU)"
    )
    parser.add_argument(
        "--exact", action="store_true", help="deterministic kernels, to compare losses bit by bit"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: benchmarks/results/streaming_DEVICE.json)"
    )
    args = parser.parse_args()
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # deterministic matrix products ask for it
    cuda, device = args.device == "cuda", torch.device(args.device)
    size = WAN_14B if cuda else SMALL
    if not cuda:
        torch.set_num_threads(1)  # the other core copies
    machine = measure_link(device, size) if cuda else CPU
    sweep = (512, 1024, 2048, 4096, 8192, 16384, 32768) if cuda else (64, 128, 256)
    bench = Bench(
        device=device,
        size=size,
        tokens=tuple(args.tokens or sweep),
        rounds=args.rounds or (10 if cuda else 3),
        warmup=3 if cuda else 2,
        exact=args.exact or not cuda,
        machine=machine,
    )
    known = list(bench.arms())
    if unknown := set(args.arms or ()) - set(known):
        parser.error(f"unknown arms {sorted(unknown)}; there are {', '.join(known)}")
    keys = [k for k in known if args.arms is None or k in args.arms]
    out = args.output or RESULTS / f"streaming_{args.device}.json"
    print(HEADER)
    with kernels(cuda and args.exact):
        rows = run(bench, keys, out)
    draw(bench, rows, out.with_suffix(".png"))
    judged = verdicts(bench, rows)
    for good, text in judged:
        print(f"{'pass' if good else 'FAIL'}: {text}")
    return 0 if all(good for good, _ in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
