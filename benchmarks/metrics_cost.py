"""What metrics per cell cost: a step that is measured, and one that is not, under every sharder.

    python benchmarks/metrics_cost.py              # 2 gloo ranks; about 10 minutes on 2 idle cores
    python benchmarks/metrics_cost.py --only fsdp2 ddp --rounds 60

One model is stepped in two ways that take turns: watched but not measured, where the hooks return
at once, and measured. Times are CPU time of the slowest rank, since other work may share the
machine; waiting for the one all-reduce is not in them. A ratio is the median of the rounds' ratios.
`share` is what measuring every tenth step adds to the run: a tenth of what it adds to a step. What
is added grows with tensors and weights alone, so a step of more tokens shows a smaller share: a
rank takes 1,024 tokens here, far fewer than any rank of a real run.
Writes benchmarks/results/metrics_cost.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

import dist_layerlr
from dist_layerlr import CellMetrics
from step_arms import CELLS, WIDTH, WORLD, fused_adamw, make_model, make_plan
from toys import start_rank, wrap

RESULT = Path(__file__).resolve().parent / "results" / "metrics_cost.json"
SHARDERS = ("ddp", "fsdp1", "fsdp1_flat", "fsdp2", "zero 1", "zero 2", "zero 3")
METHODS = ("full", "lora")
BATCH, TOKENS, EVERY, WARMUP = 2, 512, 10, 3
IDLE, MEASURED = "idle", "measured"
WAYS = (IDLE, MEASURED)
Row = dict[str, Any]


def main() -> None:
    """Start the ranks."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--only", choices=SHARDERS, nargs="+", help="some sharders")
    parser.add_argument("--rounds", type=int, default=16, help="of both ways (default 16)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    print(f"{'sharder':<12}{'':<6}{'CPU ms':>9}{'measured':>10}{'share':>9}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (os.path.join(folder, "store"), args)
        spawn(work, arguments, nprocs=WORLD)  # type: ignore[no-untyped-call]


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    """Do everything that one rank does."""
    start_rank(rank, store, WORLD)
    rows: list[Row] = []
    for sharder in args.only or SHARDERS:
        for method in METHODS:
            rows.append(compare(sharder, method, args.rounds))
            if rank == 0:
                print(line(rows[-1]), flush=True)
    if rank == 0:
        write(rows, args)
    # A rank that leaves early takes the store with it, which the other one may still need.
    dist.barrier()
    dist.destroy_process_group()


def compare(sharder: str, method: str, rounds: int) -> Row:
    """Step one model in all ways, in turn."""
    model = make_model(method)
    plan = make_plan(model, CELLS)
    shard = deepspeed if sharder.startswith("zero") else native
    model, optimizer, step = shard(sharder, model, plan)
    cells = CellMetrics(plan, model, optimizer, every=None)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + WARMUP):
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            seconds = torch.tensor(timed(way, cells, step), dtype=torch.float64)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if number >= WARMUP:
                times[way].append(float(seconds))
    row: Row = {"sharder": sharder, "method": method}
    row["step_ms"] = statistics.median(times[IDLE]) * 1e3
    pairs = zip(times[MEASURED], times[IDLE], strict=True)
    row[MEASURED] = statistics.median(a / b for a, b in pairs)
    row["share"] = (row[MEASURED] - 1) / EVERY
    return row


def timed(way: str, cells: CellMetrics, step: Callable[[], object]) -> float:
    """CPU seconds of one step, and of asking for its numbers."""
    # A rank that comes late would else charge its delay to the other rank's collectives.
    dist.barrier()
    start = time.process_time()
    if way == MEASURED:
        cells.arm()
    step()
    assert (cells.read() is not None) == (way == MEASURED)
    return time.process_time() - start


def native(sharder: str, model: nn.Module, plan: dist_layerlr.Plan) -> Any:
    """A model under torch's own sharders: (model, optimizer, what does a step)."""
    wrapped = wrap(sharder, model, WORLD)
    optimizer = dist_layerlr.attach(plan, wrapped, fused_adamw)
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def step() -> None:
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return wrapped, optimizer, step


def deepspeed(sharder: str, model: nn.Module, plan: dist_layerlr.Plan) -> Any:
    """A model in a DeepSpeed engine: (engine, None, what does a step)."""
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": int(sharder.split()[1])},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    with contextlib.redirect_stdout(None):
        engine: Any = dist_layerlr.initialize_deepspeed(plan, model, fused_adamw, config)
    engine = engine[0] if isinstance(engine, tuple) else engine
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def step() -> None:
        engine.backward(engine(x).square().mean())
        engine.step()

    return engine, None, step


def line(row: Row) -> str:
    """One line of the table."""
    text = f"{row['sharder']:<12}{row['method']:<6}{row['step_ms']:>9.1f}"
    return f"{text}{row[MEASURED]:>10.3f}{row['share']:>9.2%}"


def write(rows: list[Row], args: argparse.Namespace) -> None:
    """Write the rows, and what they were measured with, as JSON."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    size = {"batch": BATCH, "tokens": TOKENS, "cells": CELLS, "every": EVERY}
    result = {"device": "cpu", "ranks": WORLD, "rounds": args.rounds, **size, **versions}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
