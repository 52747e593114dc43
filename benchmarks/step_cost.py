"""What per-layer learning rates cost: one flat rate against 144, as groups and segmented, under
every sharder.

    python benchmarks/step_cost.py            # 2 gloo ranks; about 19 minutes on 2 cores
    python benchmarks/step_cost.py --only "zero 1" --rounds 40

Each arm has a model and optimizer of its own. Arms take turns, in rotating order, and a ratio is
the median of the rounds' ratios, so a slow moment of the machine hits all arms alike. `flat` is the
sharder's ordinary setting: torch AdamW, one group, one rate. Prints ratios, writes
benchmarks/results/step_cost.json.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_layerlr

WORLD = 2
BLOCKS, WIDTH, BATCH, TOKENS = 48, 96, 2, 16
SHARDERS = (
    "ddp",
    "fsdp1",
    "fsdp1 flat",
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
WARMUP = 3


class Block(nn.Module):
    """A pre-norm transformer block with 21 parameter tensors, named as diffusers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.attn1 = nn.ModuleDict(
            {n: nn.Linear(WIDTH, WIDTH) for n in ("to_q", "to_k", "to_v", "to_out")}
        )
        self.attn2 = nn.ModuleDict(
            {n: nn.Linear(WIDTH, WIDTH, bias=False) for n in ("to_q", "to_k", "to_v")}
        )
        self.ff = nn.ModuleDict(
            {"linear_in": nn.Linear(WIDTH, 2 * WIDTH), "linear_out": nn.Linear(2 * WIDTH, WIDTH)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) -> (B, T, WIDTH)."""
        for attention, norm in ((self.attn1, self.norm1), (self.attn2, self.norm2)):
            h = norm(x)
            y = nn.functional.scaled_dot_product_attention(
                attention["to_q"](h), attention["to_k"](h), attention["to_v"](h)
            )
            x = x + (attention["to_out"](y) if "to_out" in attention else y)
        return x + self.ff["linear_out"](nn.functional.gelu(self.ff["linear_in"](self.norm3(x))))


class Model(nn.Module):
    """48 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) -> (B, T, WIDTH)."""
        for block in self.transformer_blocks:
            x = block(x)
        return x


@dataclasses.dataclass
class Arm:
    """One way to train: runs a step, returns (whole step, optimizer step alone) in seconds."""

    run: Callable[[], tuple[float, float]]
    whole: list[float] = dataclasses.field(default_factory=list)
    alone: list[float] = dataclasses.field(default_factory=list)


def make_model(method: str) -> nn.Module:
    """The same weights for every arm."""
    torch.manual_seed(0)
    model: nn.Module = Model()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["to_q", "to_v", "linear_in"]
        model = get_peft_model(
            model, LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
        )  # type: ignore[arg-type]
    return model


def make_plan(model: nn.Module, rates: int) -> dist_layerlr.Plan:
    """A plan with ``rates`` distinct learning rates, neighbours by cell.

    144 is one per component and block.
    """
    config = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, "unmatched": "default"}}
    plan = dist_layerlr.plan_model(model, config)
    cells = {
        c: i
        for i, c in enumerate(dict.fromkeys((e.block, e.component) for e in plan.entries.values()))
    }
    count = len(plan.entries)
    entries = {}
    for i, (name, entry) in enumerate(plan.entries.items()):
        place = (
            i * rates // count
            if rates > 144
            else cells[entry.block, entry.component] * rates // len(cells)
        )
        entries[name] = dataclasses.replace(entry, lr=1e-5 * (1 + place))
    return dataclasses.replace(plan, entries=entries)


def wrap(sharder: str, model: nn.Module) -> nn.Module:
    """Shard as a user would."""
    if sharder == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    if sharder == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    units = {id(m) for m in blocks}
    if sharder == "fsdp1 flat" and not all(p.requires_grad for p in model.parameters()):
        units |= {
            id(m)
            for m in model.modules()
            if any(p.requires_grad for p in m.parameters(recurse=False))
        }
    policy = CustomPolicy(lambda m: id(m) in units)
    orig, cpu = sharder == "fsdp1", torch.device("cpu")
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=orig, device_id=cpu
    )


def native_arm(sharder: str, method: str, emission: str, rates: int) -> Arm:
    """An arm under torch's own sharders."""
    model = make_model(method)
    plan = make_plan(model, rates)
    model = wrap(sharder, model)
    optimizer: torch.optim.Optimizer
    if emission == "flat":
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True
        )
    else:
        optimizer = dist_layerlr.attach(
            plan, model, lambda g: torch.optim.AdamW(g, fused=True), emission=emission
        )
        dist_layerlr.verify(plan, model, optimizer)
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def run() -> tuple[float, float]:
        dist.barrier()
        start = time.perf_counter()
        model(x).square().mean().backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        return time.perf_counter() - start, end - middle

    return Arm(run)


def zero_arm(sharder: str, method: str, emission: str, rates: int) -> Arm:
    """An arm under DeepSpeed."""
    import deepspeed

    stage, offload = int(sharder.split()[1]), "offload" in sharder
    model = make_model(method)
    plan = make_plan(model, rates)
    zero: dict[str, Any] = {
        "stage": stage,
        **({"offload_optimizer": {"device": "cpu"}} if offload else {}),
    }
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer: torch.optim.Optimizer
    if emission == "flat":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    else:
        optimizer = dist_layerlr.attach(
            plan, model, lambda g: torch.optim.AdamW(g, fused=True), emission=emission
        )
    with contextlib.redirect_stdout(None):
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if emission == "segmented":
        dist_layerlr.bind(plan, engine)
    if emission != "flat":
        dist_layerlr.verify(plan, engine)
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def run() -> tuple[float, float]:
        dist.barrier()
        start = time.perf_counter()
        engine.backward(engine(x).square().mean())
        middle = time.perf_counter()
        engine.step()
        end = time.perf_counter()
        return end - start, end - middle

    return Arm(run)


def make_arm(sharder: str, method: str, emission: str, rates: int) -> Arm:
    """Build one arm."""
    build = zero_arm if sharder.startswith("zero") else native_arm
    return build(sharder, method, emission, rates)


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


def upkeep(sharder: str) -> dict[str, float]:
    """Seconds of what is not a step, for 4,000 names at 144 rates; medians of 5."""
    model: nn.Module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(MANY_NAMES // 2)))
    config = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, "unmatched": "default"}}
    plan = dist_layerlr.plan_model(model, config)
    entries = {
        n: dataclasses.replace(e, lr=1e-6 * (i % 144 + 1))
        for i, (n, e) in enumerate(plan.entries.items())
    }
    plan = dataclasses.replace(plan, entries=entries)
    model = wrap(sharder, model)

    def attach() -> torch.optim.Optimizer:
        return dist_layerlr.attach(plan, model, lambda g: torch.optim.AdamW(g, fused=True))

    optimizer = attach()
    schedule = dist_layerlr.PlanSchedule(
        optimizer, dist_layerlr.Schedule(kind="cosine", total_steps=100)
    )
    return {
        "attach_s": _seconds(attach),
        "verify_s": _seconds(
            lambda: dist_layerlr.verify(plan, model, optimizer, factor=schedule.factor)
        ),
        "schedule_step_s": _seconds(schedule.step),
    }


def _seconds(action: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        dist.barrier()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def work(rank: int, store: str, only: str | None, rounds: int, out: str) -> None:
    """Everything one rank does."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), DS_ACCELERATOR="cpu"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    _quiet_deepspeed()
    rows: list[dict[str, Any]] = []
    for sharder in SHARDERS:
        if only is not None and sharder != only:
            continue
        for method in METHODS:
            emissions = ["flat", *([] if sharder == "fsdp1 flat" else ["groups"]), "segmented"]
            arms = {e: make_arm(sharder, method, e, 144) for e in emissions}
            interleave(arms, rounds)
            rows.append({"sharder": sharder, "method": method, "lrs": 144, **_summary(arms)})
            _print_row(rank, rows[-1])
        if sharder in ("fsdp2", "zero 2"):
            arms = {str(n): make_arm(sharder, "full", "segmented", n) for n in SCALING}
            interleave(arms, rounds)
            rows.append({"sharder": sharder, "method": "full", "scaling": True, **_summary(arms)})
            _print_scaling(rank, rows[-1])
    for sharder in ("ddp", "fsdp2"):
        if only is None or sharder == only:
            rows.append({"sharder": sharder, "names": MANY_NAMES, **upkeep(sharder)})
            _print_upkeep(rank, rows[-1])
    if rank == 0:
        _write(rows, rounds, Path(out))
    dist.barrier()
    dist.destroy_process_group()


def _quiet_deepspeed() -> None:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _summary(arms: dict[str, Arm]) -> dict[str, Any]:
    """Medians of each arm, and of its rounds relative to the first arm's."""
    first = next(iter(arms.values()))
    return {
        name: {
            "whole_ms": statistics.median(arm.whole) * 1e3,
            "optimizer_ms": statistics.median(arm.alone) * 1e3,
            "whole_ratio": _ratio(arm.whole, first.whole),
            "optimizer_ratio": _ratio(arm.alone, first.alone),
        }
        for name, arm in arms.items()
    }


def _ratio(times: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def _print_row(rank: int, row: dict[str, Any]) -> None:
    if rank:
        return
    flat = row["flat"]
    text = f"{row['sharder']:<16}{row['method']:<6}"
    text += f"{flat['whole_ms']:>9.1f}{flat['optimizer_ms']:>9.1f}"
    for emission in ("groups", "segmented"):
        if emission in row:
            text += f"{row[emission]['whole_ratio']:>10.2f}{row[emission]['optimizer_ratio']:>8.2f}"
        else:
            text += f"{'-':>10}{'-':>8}"
    print(text, flush=True)


def _print_scaling(rank: int, row: dict[str, Any]) -> None:
    if rank:
        return
    parts = [f"{n} LRs {row[str(n)]['whole_ratio']:.3f}" for n in SCALING]
    print(
        f"{row['sharder']:<16}scaling, whole step relative to 1 LR: {', '.join(parts)}", flush=True
    )


def _print_upkeep(rank: int, row: dict[str, Any]) -> None:
    if rank:
        return
    what = f"attach {row['attach_s']:.2f} s, verify {row['verify_s']:.2f} s"
    print(
        f"{row['sharder']:<16}{MANY_NAMES:,} names: {what}, schedule step"
        f" {row['schedule_step_s'] * 1e6:.0f} us",
        flush=True,
    )


def _write(rows: list[dict[str, Any]], rounds: int, out: Path) -> None:
    import deepspeed

    versions = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
    }
    result = {"device": "cpu", "ranks": WORLD, "rounds": rounds, **versions, "rows": rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SHARDERS, help="one sharder")
    parser.add_argument(
        "--rounds", type=int, default=20, help="measured steps per arm (default 20)"
    )
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "step_cost.json"))
    args = parser.parse_args()
    print(
        "ms of a step and of its optimizer step with one flat rate; then 144 rates relative to that"
    )
    print(
        f"{'sharder':<16}{'':<6}{'step':>9}{'optim':>9}{'groups':>10}{'optim':>8}{'segmented':>10}{'optim':>8}"
    )
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        torch.multiprocessing.spawn(work, (store, args.only, args.rounds, args.out), nprocs=WORLD)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
