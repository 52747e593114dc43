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
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_layerlr.offload.predict import predict
from dist_layerlr.offload.prediction import GB, Layout, Prediction, Workload
from streaming_arms import Arm, kernels
from streaming_model import SMALL, WAN_14B
from streaming_report import HEADER, Row, draw, line_of, verdicts
from streaming_setup import CPU, Bench, measure_link

RESULTS = Path(__file__).resolve().parent / "results"


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
            except Exception as error:
                # The device is out of memory, or a library cannot train this way: that is a result.
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
                print(line_of(row), flush=True)
        for arm in arms:
            arm.stop()
        _write(out, bench, rows)
    return rows


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
    # Deterministic matrix products ask for it before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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
