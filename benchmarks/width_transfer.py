"""Does a rate found on a narrow model hold on wide ones? One flat rate beside `width_scaling`.

    python benchmarks/width_transfer.py            # about 20 minutes on 2 idle cores; resumes
    python benchmarks/width_transfer.py --report   # the table and the plot of what has been run

A character model (LLaMA's classes, 2 blocks, heads of 16) learns the source of the standard library
at widths 64, 128 and 256. Both arms begin from the same weights (variance 1/fan-in, an output layer
of zeros) and see the same text; only the rates of names differ: `flat` gives all of them one,
`scaled` divides by what muP says beside width 64. Each arm has its whole sweep of rates, two apart,
and two seeds. The best rate is that of the least mean loss on text that was held out.

Writes benchmarks/results/width_transfer.json after every run, and width_transfer.png beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dist_layerlr
from dist_layerlr import PlanSchedule, Schedule

RESULT = Path(__file__).resolve().parent / "results" / "width_transfer.json"
WIDTHS, BASE = (64, 128, 256), 64
FLAT, SCALED = "flat", "scaled"
RATES = tuple(2.0**power for power in range(-11, -3))
SEEDS = (0, 1)
BLOCKS, HEAD, LENGTH, BATCH, STEPS, WARMUP = 2, 16, 64, 16, 120, 10
LETTERS, HELD_OUT = 128, 64
Row = dict[str, Any]
Run = tuple[str, int, float, int]
"""(arm, width, rate, seed)."""


def main() -> None:
    """Run what is missing, then report."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file")
    args = parser.parse_args()
    rows = read(args.out)
    if not args.report:
        # Forked workers would inherit torch's threads, which do not survive a fork.
        pool = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"))
        with pool:
            for done in as_completed([pool.submit(run, one) for one in missing(rows)]):
                rows.append(done.result())
                write(args.out, rows)
    print(table(rows))
    plot(rows, args.out.with_suffix(".png"))


def all_runs() -> Iterator[Run]:
    """Every run; at the base's width both arms are one."""
    for width, rate, seed in itertools.product(WIDTHS, RATES, SEEDS):
        for arm in (FLAT, SCALED) if width != BASE else (FLAT,):
            yield arm, width, rate, seed


def missing(rows: list[Row]) -> list[Run]:
    """Runs without a row, the widest first: they take longest."""
    done = {(row["arm"], row["width"], row["rate"], row["seed"]) for row in rows}
    return sorted((one for one in all_runs() if one not in done), key=lambda one: -one[1])


def run(one: Run) -> Row:
    """Train once; the loss on held-out text."""
    arm, width, rate, seed = one
    torch.set_num_threads(1)
    training, held_out = text()
    model = make_model(width, seed)
    config: dict[str, Any] = {"learning_rate": rate, "per_layer_lr": {"enabled": False}}
    with tempfile.TemporaryDirectory() as folder:
        if arm == SCALED:
            config["width_scaling"] = {"base": write_base(Path(folder) / "base.tsv")}
        plan = dist_layerlr.plan_model(model, config)
    optimizer = dist_layerlr.attach(
        plan, model, lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    )
    schedule = PlanSchedule(
        optimizer, Schedule(kind="linear", warmup_steps=WARMUP, total_steps=STEPS)
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        starts = torch.randint(len(training) - LENGTH - 1, (BATCH,), generator=generator)
        torch.autograd.backward(loss_of(model, training, starts))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        starts = torch.linspace(0, len(held_out) - LENGTH - 1, HELD_OUT).long()
        loss = float(loss_of(model, held_out, starts))
    return {"arm": arm, "width": width, "rate": rate, "seed": seed, "loss": loss}


def text() -> tuple[Tensor, Tensor]:
    """Source of the standard library in ASCII: all modules but the last twentieth, and those."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    held_out = files[-len(files) // 20 :]
    both = []
    for chosen in (files[: -len(held_out)], held_out):
        letters = b"".join(file.read_bytes() for file in chosen)
        # Bytes above 127, in comments, become zeros.
        codes = torch.frombuffer(bytearray(letters), dtype=torch.uint8).long()
        both.append(torch.where(codes < LETTERS, codes, 0))
    return both[0], both[1]


def make_model(width: int, seed: int) -> nn.Module:
    """LLaMA's classes; muP's initial weights, which suit one flat rate as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LETTERS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=width // HEAD,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    for name, param in model.named_parameters():
        if "embed_tokens" in name:
            nn.init.normal_(param, std=1.0)
        elif "lm_head" in name:
            nn.init.zeros_(param)
        elif param.ndim > 1:
            nn.init.normal_(param, std=param.shape[1] ** -0.5)
    return model


def write_base(path: Path) -> str:
    """Names and shapes of the model that the rates are from."""
    lines = []
    for name, param in make_model(BASE, 0).named_parameters():
        lines.append(f"{name}\t{'x'.join(map(str, param.shape))}")
    path.write_text("\n".join(lines))
    return str(path)


def loss_of(model: nn.Module, letters: Tensor, starts: Tensor) -> Tensor:
    """Cross entropy of the next letter, in nats."""
    windows = letters[starts[:, None] + torch.arange(LENGTH + 1)]
    logits = model(input_ids=windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def curve(rows: list[Row], arm: str, width: int) -> dict[float, float]:
    """{rate: mean loss over seeds}; the base's width has one arm for both."""
    arm = FLAT if width == BASE else arm
    losses: dict[float, list[float]] = {}
    for row in rows:
        if (row["arm"], row["width"]) == (arm, width):
            losses.setdefault(row["rate"], []).append(row["loss"])
    return {rate: statistics.fmean(losses[rate]) for rate in sorted(losses)}


def best(found: dict[float, float]) -> float:
    """The rate of the least loss; a run that diverged to NaN is never best."""
    return min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)


def table(rows: list[Row]) -> str:
    """Losses by rate, and how far the best rate moves from the base's, in steps of the grid."""
    head = f"{'arm':<8}{'width':>6}" + "".join(f"{f'2^{math.log2(r):g}':>8}" for r in RATES)
    lines = [head + f"{'best':>8}{'moved':>7}"]
    for arm in (FLAT, SCALED):
        for width in WIDTHS:
            found = curve(rows, arm, width)
            if not found:
                continue
            losses = "".join(f"{found.get(rate, math.nan):>8.3f}" for rate in RATES)
            start = curve(rows, arm, BASE)
            moved = f"{math.log2(best(found) / best(start)):+.0f}" if start else "?"
            place = f"2^{math.log2(best(found)):g}"
            lines.append(f"{arm:<8}{width:>6}{losses}{place:>8}{moved:>7}")
    lines += transfer(rows)
    return "\n".join(lines)


def transfer(rows: list[Row]) -> list[str]:
    """What it costs to take the base's best rate to the widest model instead of searching there."""
    lines = []
    start = curve(rows, FLAT, BASE)
    for arm in (FLAT, SCALED):
        found = curve(rows, arm, WIDTHS[-1])
        if start and best(start) in found:
            loss, least = found[best(start)], found[best(found)]
            text = f"the rate of width {BASE} gives {loss:.3f}, the best one {least:.3f}"
            lines.append(f"{arm}: at width {WIDTHS[-1]} {text}")
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """Loss over rate, one curve per width, one panel per arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for panel, arm in zip(panels, (FLAT, SCALED), strict=True):
        for width, colour in zip(WIDTHS, ("#56b4e9", "#0072b2", "#d55e00"), strict=True):
            found = curve(rows, arm, width)
            if found:
                panel.plot(found.keys(), found.values(), color=colour, label=f"width {width}")
                panel.plot(best(found), found[best(found)], "o", color=colour)
        panel.set_xscale("log", base=2)
        panel.set_title("one flat rate" if arm == FLAT else "width_scaling, muP, from width 64")
        panel.set_xlabel("learning rate")
        panel.legend()
    panels[0].set_ylabel("held-out loss (nats per letter)")
    figure.savefig(path, dpi=120)


def read(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def write(path: Path, rows: list[Row]) -> None:
    """Write the rows, and what they were measured with, as JSON."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    size = {"blocks": BLOCKS, "length": LENGTH, "batch": BATCH, "steps": STEPS}
    order = sorted(rows, key=lambda row: (row["arm"], row["width"], row["rate"], row["seed"]))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**versions, **size, "rows": order}, indent=1) + "\n")


if __name__ == "__main__":
    main()
