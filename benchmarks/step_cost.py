"""What per-layer learning rates cost: 144 rates beside one flat rate, under every sharder.

    python benchmarks/step_cost.py            # 2 gloo ranks; about 25 minutes on 2 cores
    python benchmarks/step_cost.py --only "zero 1" --rounds 40
    python benchmarks/step_cost.py --upkeep   # what is not a step: attach, verify, trial; 2 minutes
    python benchmarks/step_cost.py --device cuda   # one card, TableAdamW included: step_card.py

Each arm of step_arms.py has a model and an optimizer of its own. Arms take turns in rotating order,
and a ratio is the median of the rounds' ratios, so that a slow moment of the machine hits all arms
alike. The bar is `flat fused`: the printed ratios of groups and segments are relative to it (whole
step, optimizer step), those behind the slash to `flat`. Writes every arm into
benchmarks/results/step_cost.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.optim import AdamW

import dist_layerlr
import step_card
from step_arms import (
    CONFIG,
    FLAT,
    FLAT_FUSED,
    PLANNED,
    SEGMENTED,
    WORLD,
    Arm,
    fused_adamw,
    make_arm,
    names_of_arms,
)
from toys import start_rank, wrap

RESULT = Path(__file__).resolve().parent / "results" / "step_cost.json"
SHARDERS = (
    "ddp",
    "fsdp1",
    "fsdp1_flat",
    "fsdp2",
    "zero 0",
    "zero 1",
    "zero 2",
    "zero 2 offload",
    "zero 3",
)
METHODS = ("full", "lora")
SCALING = (1, 12, 144, 1000)
MANY_NAMES = 4000
TRIALS = 15
WARMUP = 3
"""Unmeasured steps: the first one makes the optimizer's state, and allocators settle."""
COLUMNS = f"{'whole':>7} /{'flat':>5}{'optim':>8} /{'flat':>5}"
HEADER = (
    "ms of a step and of its optimizer step at one flat rate, fused; then 144 rates relative to"
    " that, and to flat\n"
    f"{'sharder':<16}{'':<6}{'step':>9}{'optim':>9}{'flat':>7}"
    f"   {'groups':<{len(COLUMNS)}}   {'segmented':<{len(COLUMNS)}}\n"
    f"{'':<47}   {COLUMNS}   {COLUMNS}"
)
Row = dict[str, Any]


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SHARDERS, help="one sharder")
    parser.add_argument(
        "--upkeep", action="store_true", help="only what is not a step; nothing is written"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--rounds", type=int, default=20, help="measured steps (default 20)")
    parser.add_argument("--out", type=Path, help="JSON file (default below benchmarks/results)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--width", type=int, default=step_card.WIDTH, help="of the model on a card (2048: 18 GB)"
    )
    args = parser.parse_args()
    if args.device == "cuda":
        args.out = args.out or step_card.RESULT
        step_card.main(args)
        return
    args.out = args.out or RESULT
    if not args.upkeep:
        print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (os.path.join(folder, "store"), args)
        spawn(work, arguments, nprocs=WORLD)  # type: ignore[no-untyped-call]


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    """Do everything that one rank does."""
    start_rank(rank, store, WORLD)
    rows: list[Row] = []

    def add(row: Row, text: str) -> None:
        rows.append(row)
        if rank == 0:
            print(text, flush=True)

    for sharder in SHARDERS if args.only is None else (args.only,):
        for method in () if args.upkeep else args.methods:
            row = compare(sharder, method, args.rounds)
            add(row, line_of_arms(row))
        if sharder in ("fsdp2", "zero 2") and not args.upkeep:
            row = scale(sharder, args.rounds)
            add(row, line_of_scaling(row))
        if not sharder.startswith("zero"):
            row = upkeep(sharder)
            add(row, line_of_upkeep(row))
    if rank == 0 and not args.upkeep:
        write(rows, args.rounds, args.out)
    # A rank that leaves early takes the store with it, which the other one may still need.
    dist.barrier()
    dist.destroy_process_group()


def compare(sharder: str, method: str, rounds: int) -> Row:
    """Measure all arms of one sharder and method."""
    arms = {name: make_arm(sharder, method, name) for name in names_of_arms(sharder)}
    interleave(arms, rounds)
    return {"sharder": sharder, "method": method, "lrs": 144, **summary(arms, (FLAT, FLAT_FUSED))}


def scale(sharder: str, rounds: int) -> Row:
    """Measure the segmented arm at 1 to 1,000 rates."""
    arms = {str(count): make_arm(sharder, "full", SEGMENTED, count) for count in SCALING}
    interleave(arms, rounds)
    return {"sharder": sharder, "method": "full", "scaling": True, **summary(arms, ("1",))}


def interleave(arms: dict[str, Arm], rounds: int) -> None:
    """Step all arms in turn; the slowest rank counts."""
    for i in range(rounds + WARMUP):
        turn = list(arms.values())
        for arm in turn[i % len(turn) :] + turn[: i % len(turn)]:
            times = torch.tensor(arm.run(), dtype=torch.float64)
            dist.all_reduce(times, op=dist.ReduceOp.MAX)
            if i >= WARMUP:
                arm.whole.append(float(times[0]))
                arm.alone.append(float(times[1]))


def summary(arms: dict[str, Arm], bases: tuple[str, ...]) -> Row:
    """{arm: medians in ms, and of the rounds relative to each of the base arms}."""
    found: Row = {}
    for name, arm in arms.items():
        found[name] = {
            "whole_ms": statistics.median(arm.whole) * 1e3,
            "optimizer_ms": statistics.median(arm.alone) * 1e3,
        }
        for base in bases:
            found[name][f"whole_to_{base}"] = _ratio(arm.whole, arms[base].whole)
            found[name][f"optimizer_to_{base}"] = _ratio(arm.alone, arms[base].alone)
    return found


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def upkeep(sharder: str) -> Row:
    """Seconds of what is not a step, for 4,000 names at 144 rates; medians."""
    model: nn.Module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(MANY_NAMES // 2)))
    plan = dist_layerlr.plan_model(model, CONFIG)
    entries = {}
    for i, (name, entry) in enumerate(plan.entries.items()):
        entries[name] = dataclasses.replace(entry, lr=1e-6 * (i % 144 + 1))
    plan = dataclasses.replace(plan, entries=entries)
    model = wrap(sharder, model, WORLD)
    attach = partial(dist_layerlr.attach, plan, model, fused_adamw)
    optimizer = attach()
    cosine = dist_layerlr.Schedule(kind="cosine", total_steps=100)
    schedule = dist_layerlr.PlanSchedule(optimizer, cosine)

    def verify() -> None:
        dist_layerlr.verify(plan, model, optimizer, factor=schedule.factor)

    return {
        "sharder": sharder,
        "names": MANY_NAMES,
        "attach_s": _seconds(attach),
        "verify_s": _seconds(verify),
        "schedule_step_s": _seconds(schedule.step),
        "trial_s": trial(sharder),
    }


def trial(sharder: str) -> float:
    """Seconds of CPU time by which an optimizer that must be tried costs more than a known one."""
    model: nn.Module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    plan = dist_layerlr.plan_model(model, CONFIG)
    model = wrap(sharder, model, WORLD)
    extra = []
    for number in range(TRIALS):
        # Every trial is of settings that none was of before.
        make = partial(AdamW, fused=True, eps=1e-8 * (1 + number / TRIALS))
        times = []
        for _ in range(2):
            start = time.process_time()
            dist_layerlr.attach(plan, model, make)
            times.append(time.process_time() - start)
        extra.append(times[0] - times[1])
    return statistics.median(extra)


def _seconds(action: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def line_of_arms(row: Row) -> str:
    """One line of the table."""
    bar = row[FLAT_FUSED]
    text = f"{row['sharder']:<16}{row['method']:<6}"
    text += f"{bar['whole_ms']:>9.1f}{bar['optimizer_ms']:>9.1f}"
    text += f"{row[FLAT]['whole_to_flat fused']:>7.2f}"
    for name in PLANNED:
        if name not in row:
            text += f"   {'-':>{len(COLUMNS)}}"
            continue
        ratios = row[name]
        text += f"   {ratios['whole_to_flat fused']:>7.2f} /{ratios['whole_to_flat']:>5.2f}"
        text += f"{ratios['optimizer_to_flat fused']:>8.2f} /{ratios['optimizer_to_flat']:>5.2f}"
    return text


def line_of_scaling(row: Row) -> str:
    """What more rates cost."""
    parts = ", ".join(f"{count} LRs {row[str(count)]['whole_to_1']:.3f}" for count in SCALING)
    return f"{row['sharder']:<16}scaling, whole step relative to 1 LR: {parts}"


def line_of_upkeep(row: Row) -> str:
    """What is paid once, and by a scheduler."""
    what = f"attach {row['attach_s']:.2f} s, verify {row['verify_s']:.2f} s"
    step = row["schedule_step_s"] * 1e6
    what += f", schedule step {step:.0f} us; trial of AdamW {row['trial_s'] * 1e3:.0f} ms of CPU"
    return f"{row['sharder']:<16}{MANY_NAMES:,} names: {what}"


def write(rows: list[Row], rounds: int, out: Path) -> None:
    """Write the rows, and what they were measured with, as JSON."""
    import deepspeed

    versions = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
    }
    result = {"device": "cpu", "ranks": WORLD, "rounds": rounds, **versions, "rows": rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
