"""What checkpoints cost beside the libraries' own, in time and memory, under every sharder.

    python benchmarks/checkpoint.py    # 2 gloo ranks; about 7 minutes on 2 idle cores
    python benchmarks/checkpoint.py --only fsdp2 --rounds 9 --folder /dev/shm

`checkpoints`: save and load of weights and AdamW state, ours beside torch's (get_state_dict,
dcp.save, dcp.load, set_state_dict) or DeepSpeed's (engine.save_checkpoint, load_checkpoint), in
turns. Seconds are medians of the slowest rank, ratios medians of each round's ratio. DeepSpeed
leaves its files to the page cache; they are fsynced here within its time, as DCP and ours do by
themselves, and the time without is given too. Loads read from the page cache, into state that
exists. Peak memory is the rank's resident set during the call, above what it was before it.

`base_model`: see load_model.py.

Writes its part of benchmarks/results/checkpoint.json; the other parts stay.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import dist_layerlr
from load_model import base_model, resident_mb
from toys import Model, start_rank, wrap

WORLD = 2
WIDTH, BLOCKS, SAMPLES, TOKENS = 1072, 4, 4, 2
SHARDERS = ("ddp", "fsdp1", "fsdp1_flat", "fsdp2", "zero 1", "zero 2", "zero 3")
CONFIG = {
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-4, "ffn": 1e-4},
        "default_lr": 2e-4,
        "unmatched": "default",
    }
}


@dataclass
class Arm:
    """One way to save and load, and what it took: {"save", "load", ...: numbers of each round}."""

    save: Callable[[Path], object]
    load: Callable[[Path], object]
    sync: bool = False
    """Whether its files must be brought to disk by hand."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: dict[str, list[float]] = field(default_factory=dict)


def make_model() -> nn.Module:
    """50 million parameters: 0.6 GB with AdamW's state."""
    return Model(BLOCKS, WIDTH)


def batch() -> Tensor:
    """Enough for a gradient in every parameter."""
    return torch.randn(SAMPLES, TOKENS, WIDTH)


def native_arms(sharder: str) -> dict[str, Arm]:
    """DCP on an ordinary optimizer, and ours on an attached one."""
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    plain = wrap(sharder, make_model(), WORLD)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)
    plain(batch()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

    def save(folder: Path) -> None:
        weights, state = get_state_dict(plain, optimizer)
        state_dict_saver.save({"model": weights, "optimizer": state}, checkpoint_id=folder)

    def load(folder: Path) -> None:
        weights, state = get_state_dict(plain, optimizer)
        both: dict[str, Any] = {"model": weights, "optimizer": state}
        state_dict_loader.load(both, checkpoint_id=folder)
        set_state_dict(
            plain, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"]
        )

    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    sharded = wrap(sharder, model, WORLD)
    attached = dist_layerlr.attach(plan, sharded, lambda groups: torch.optim.AdamW(groups))
    sharded(batch()).square().mean().backward()
    attached.step()
    attached.zero_grad()
    return {"theirs": Arm(save, load), "ours": our_arm(plan, sharded, attached)}


def zero_arms(sharder: str) -> dict[str, Arm]:
    """DeepSpeed's own, and ours, each on its engine."""
    import deepspeed

    zero = {"stage": int(sharder.split()[1])}
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engines = []
    for _ in range(2):
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        optimizer = dist_layerlr.attach(
            plan, model, lambda groups: torch.optim.AdamW(groups, fused=True), emission="segmented"
        )
        with contextlib.redirect_stdout(None):
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        dist_layerlr.bind(plan, engine)
        engine.backward(engine(batch()).square().mean())
        engine.step()
        engines.append(engine)
    theirs, ours = engines
    save, load = (
        lambda folder: theirs.save_checkpoint(str(folder), tag="t"),
        lambda folder: theirs.load_checkpoint(str(folder), tag="t"),
    )
    return {"theirs": Arm(save, load, sync=True), "ours": our_arm(plan, ours, None)}


def our_arm(plan: dist_layerlr.Plan, model: Any, optimizer: Any) -> Arm:
    """Ours, the same calls everywhere."""
    return Arm(
        lambda folder: dist_layerlr.save_checkpoint(folder, plan, model, optimizer, step=1).wait(),
        lambda folder: dist_layerlr.load_checkpoint(folder, plan, model, optimizer),
    )


def measure(arm: Arm, what: str, call: Callable[[], Any]) -> None:
    """Time of the slowest rank and its largest memory above the start, once."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is resident now
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    call()
    numbers = torch.tensor(
        [time.perf_counter() - start, resident_mb("VmHWM") - before], dtype=torch.float64
    )
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    arm.seconds.setdefault(what, []).append(float(numbers[0]))
    arm.peak_mb.setdefault(what, []).append(float(numbers[1]))


def sync(folder: Path) -> None:
    """Bring this rank's half of the files to disk."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file())[dist.get_rank() :: WORLD]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def save_to_disk(arm: Arm, folder: Path) -> None:
    """Save, and fsync where the library does not; the time before that is kept, too."""
    start = time.perf_counter()
    arm.save(folder)
    arm.seconds.setdefault("save_unsynced", []).append(time.perf_counter() - start)
    if arm.sync:
        dist.barrier()
        sync(folder)


def take_turns(arms: dict[str, Arm], rounds: int, scratch: Path) -> None:
    """Save and load with each arm in every round, in changing order.

    The first round is not counted.
    """
    for number in range(rounds + 1):
        names = list(arms) if number % 2 else list(arms)[::-1]
        for name in names:
            arm, folder = arms[name], scratch / f"{name}{number}"

            measure(arm, "save", partial(save_to_disk, arm, folder))
            measure(arm, "load", partial(arm.load, folder))
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder)
    for arm in arms.values():
        for series in (*arm.seconds.values(), *arm.peak_mb.values()):
            del series[0]


def checkpoints(rank: int, only: str | None, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """Rows of the table: save and load under each sharder."""
    if rank == 0:
        print(
            f"{'':<12}{'save s':>18}{'':>7}{'load s':>17}{'':>7}"
            f"{'save peak MB':>18}{'load peak MB':>18}"
        )
        print(
            f"{'sharder':<12}"
            + f"{'theirs':>9}{'ours':>9}{'ratio':>7}" * 2
            + f"{'theirs':>9}{'ours':>9}" * 2
        )
    rows = []
    for sharder in SHARDERS:
        if only is not None and sharder != only:
            continue
        arms = (zero_arms if sharder.startswith("zero") else native_arms)(sharder)
        take_turns(arms, rounds, scratch)
        ratios = {what: paired_ratio(arms, what) for what in ("save", "load")}
        rows.append(
            {
                "sharder": sharder,
                **{name: summary(arm) for name, arm in arms.items()},
                "ratio": ratios,
            }
        )
        if rank == 0:
            print_row(rows[-1])
    return rows


def summary(arm: Arm) -> dict[str, float]:
    """Medians."""
    numbers = {f"{what}_s": statistics.median(series) for what, series in arm.seconds.items()}
    return numbers | {
        f"{what}_peak_mb": statistics.median(series) for what, series in arm.peak_mb.items()
    }


def paired_ratio(arms: dict[str, Arm], what: str) -> float:
    """Median over rounds of ours / theirs: both were measured moments apart."""
    pairs = zip(arms["ours"].seconds[what], arms["theirs"].seconds[what], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    theirs, ours = row["theirs"], row["ours"]
    text = f"{row['sharder']:<12}"
    for what in ("save", "load"):
        text += f"{theirs[what + '_s']:>9.2f}{ours[what + '_s']:>9.2f}{row['ratio'][what]:>7.2f}"
    for key in ("save_peak_mb", "load_peak_mb"):
        text += f"{theirs[key]:>9.0f}{ours[key]:>9.0f}"
    print(text, flush=True)


PARTS: dict[str, Callable[[int, str | None, int, Path], Any]] = {
    "checkpoints": checkpoints,
    "base_model": base_model,
}
"""{key in the results: what measures it on every rank}."""


def work(rank: int, scratch: str, part: str, args: argparse.Namespace) -> None:
    """What one rank does for one part."""
    start_rank(rank, f"{scratch}/store_{part}", WORLD)
    found = PARTS[part](rank, args.only, args.rounds, Path(scratch))
    if rank == 0 and args.only is None:
        write(Path(args.out), part, found, args.rounds)
    dist.barrier()
    dist.destroy_process_group()


def write(out: Path, part: str, found: Any, rounds: int) -> None:
    """Put a part into the results."""
    import deepspeed

    results = json.loads(out.read_text()) if out.exists() else {}
    versions = {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "python": platform.python_version(),
    }
    results |= {
        "device": "cpu",
        "ranks": WORLD,
        **versions,
        part: {"rounds": rounds, "rows": found},
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all"
    )
    parser.add_argument("--only", choices=SHARDERS, help="one sharder; nothing is written")
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds (default 11)")
    parser.add_argument(
        "--folder", help="where to write checkpoints (default: the temporary folder)"
    )
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "checkpoint.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for part in args.parts:
            spawn(work, (scratch, part, args), nprocs=WORLD)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
