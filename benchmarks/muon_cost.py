"""What Muon for matrices costs under every sharder, beside torch.optim.Muon on whole parameters.

    python benchmarks/muon_cost.py            # 2 gloo ranks; about a minute on 2 cores
    python benchmarks/muon_cost.py --only fsdp2 --rounds 20

Matrices of 4 blocks go to Muon, the rest to AdamW. Arms take turns in rotating order; the time is
the median of ``optimizer.step()`` (ZeRO: of a backward and ``engine.step()``, since DeepSpeed's
Muon works in both), and the bytes are those that one rank sends for it, without the sharder's own.
Beside ``ours``: ``torch``, its Muon and AdamW, where they take the sharder's parameters as they are
(whole ones, DTensors); ``deepspeed``, its own Muon, not compiled. microsoft/dion is named in the
result, not measured: it is no dependency. Writes benchmarks/results/muon_cost.json.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from dist_layerlr.optim.routed import parts_of
from dist_layerlr.optim.whole import NeedsWhole
from dist_layerlr.plan import Plan
from toys import Model, start_rank, wrap

RESULT = Path(__file__).resolve().parent / "results" / "muon_cost.json"
WORLD, BLOCKS, WIDTH, TOKENS = 2, 4, 128, 32
NATIVE = ("none", "ddp", "fsdp1", "fsdp1_flat", "fsdp2")
ZERO = ("zero 1", "zero 2", "zero 3")
CONFIG = {
    "learning_rate": 1e-3,
    "per_layer_lr": {"enabled": True, "component_lr": {}, "depth_strategy": "flat"},
    "optimizers": {"muon": {"lr_multiplier": 20}, "adamw": "rest"},
}
WARMUP = 2
Row = dict[str, Any]
Arm = Callable[[], float]
"""One step; seconds of its optimizer step."""


def muon(groups: Any) -> torch.optim.Optimizer:
    """Torch's, at the rate of the groups."""
    return torch.optim.Muon(groups, lr=2e-2, weight_decay=0.1)


def adamw(groups: Any) -> torch.optim.Optimizer:
    """Torch's, in one pass over memory."""
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, fused=True)


MAKES: dict[str, Any] = {"muon": muon, "adamw": adamw}


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=(*NATIVE, *ZERO), help="one sharder")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps (default 10)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    # DeepSpeed's Muon is decorated with torch.compile, which takes minutes on a small machine.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (os.path.join(folder, "store"), args)
        spawn(work, arguments, nprocs=WORLD)  # type: ignore[no-untyped-call]


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    """Do everything that one rank does."""
    start_rank(rank, store, WORLD)
    rows: list[Row] = []
    for sharder in (*NATIVE, *ZERO) if args.only is None else (args.only,):
        rows += measure(sharder, args.rounds)
        if rank == 0:
            for row in rows[-len(arms_of(sharder)) :]:
                print(f"{row['sharder']:<12}{row['arm']:<14}{row['shown']}", flush=True)
    if rank == 0:
        found = {
            "ranks": WORLD,
            "model": {"blocks": BLOCKS, "width": WIDTH},
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "dion": "installed" if importlib.util.find_spec("dion") else "not installed",
            "rows": rows,
        }
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arms_of(sharder: str) -> list[str]:
    """What is measured under a sharder."""
    if sharder in ZERO:
        return ["ours", "deepspeed"]
    # FSDP1's parameters are 1-D: torch's Muon refuses them.
    return ["ours", "torch"] if sharder in ("none", "ddp", "fsdp2") else ["ours"]


def measure(sharder: str, rounds: int) -> list[Row]:
    """One row for each arm of a sharder."""
    made: dict[str, tuple[Arm, Callable[[], int]]] = {}
    failed: dict[str, str] = {}
    for name in arms_of(sharder):
        try:
            made[name] = make_arm(sharder, name)
        except Exception as error:  # others' code on a CPU: what it says is the result
            failed[name] = f"{type(error).__name__}: {error}".partition("\n")[0][:160]
    names = list(made)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARMUP + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            spent = made[name][0]()
            if number >= WARMUP:
                times[name].append(spent)
    rows: list[Row] = []
    for name in arms_of(sharder):
        row: Row = {"sharder": sharder, "arm": name}
        if name in failed:
            row |= {"failed": failed[name], "shown": failed[name]}
        else:
            ms = 1e3 * statistics.median(times[name])
            sent = made[name][1]() // (WARMUP + rounds)
            row |= {"step_ms": round(ms, 2), "bytes_sent_per_rank": sent}
            row["shown"] = f"{ms:8.2f} ms" + (f"{sent / 2**20:8.2f} MiB sent" if sent else "")
        rows.append(row)
    return rows


def make_arm(sharder: str, name: str) -> tuple[Arm, Callable[[], int]]:
    """(one step, bytes that this rank has sent so far for matrices)."""
    torch.manual_seed(0)
    model: Any = Model(BLOCKS, WIDTH)
    plan = dist_layerlr.plan_model(model, CONFIG)
    if sharder in ZERO:
        return _zero_arm(model, plan, int(sharder[-1]), name)
    wrapped: Any = model if sharder == "none" else wrap(sharder, model, WORLD)
    if name == "torch":
        optimizers = _by_hand(wrapped, plan)
    else:
        optimizers = [dist_layerlr.attach(plan, wrapped, MAKES)]
    _backward(wrapped, None)

    def step() -> float:
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.step()
        return time.perf_counter() - start

    return step, lambda: _sent(optimizers[0])


def _zero_arm(model: Any, plan: Plan, stage: int, name: str) -> tuple[Arm, Callable[[], int]]:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_scatter": name == "ours"},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if name == "ours":
        config["zero_allow_untested_optimizer"] = True
        engine = dist_layerlr.initialize_deepspeed(plan, model, MAKES, config)[0]
    else:
        config["optimizer"] = {"type": "Muon", "params": {"lr": 2e-2, "weight_decay": 0.1}}
        engine = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )[0]

    def step() -> float:
        # DeepSpeed's Muon orthogonalises at the end of the backward: the step alone lacks its work.
        start = time.perf_counter()
        _backward(engine, engine)
        engine.step()
        return time.perf_counter() - start

    return step, lambda: _sent(engine.optimizer.optimizer)


def _by_hand(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Torch's two optimizers on the parameters as the sharder shows them."""
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
    matrices = [p for n, p in named if plan.entries[n].optimizer == "muon"]
    others = [p for n, p in named if plan.entries[n].optimizer != "muon"]
    return [muon(matrices), adamw(others)]


def _backward(model: Any, engine: Any) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
    loss = model(torch.randn(2, TOKENS, WIDTH, generator=generator)).square().mean()
    (engine.backward if engine is not None else torch.autograd.backward)(loss)


def _sent(optimizer: Any) -> int:
    routed = parts_of(optimizer)
    total = 0
    for part in routed.parts.values() if routed is not None else ():
        if isinstance(part, NeedsWhole):
            total += 2 * sum(e.elements_moved for e in part.exchanges)  # bf16
    return total


if __name__ == "__main__":
    main()
