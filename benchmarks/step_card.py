"""What an optimizer step of many rates costs on one card: ``step_cost.py --device cuda``.

`flat fused` is one rate with ``AdamW(fused=True)``, the bar. `groups` and `segmented` call that
kernel once for each rate; the `table` arms are ``TableAdamW``, one launch for all rates, and `table
graph` replays it as a CUDA graph. All arms step the same parameters with the same gradients, one
arm after another, so that memory holds one optimizer's state at a time. Measured are the step alone
on the host's clock, the device waited for (`ms`), and until the host is free again (`host`).

Nothing here has been run on a card yet: what it prints decides whether TableAdamW should be chosen
where Triton is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

import dist_layerlr
from dist_layerlr.optim import TableAdamW
from dist_layerlr.sharders.base import ParamGroup
from step_arms import BLOCKS, CELLS, fused_adamw, make_plan
from toys import Model

RESULT = Path(__file__).resolve().parent / "results" / "step_card.json"
RATES = (CELLS, 1000)
BLOCKS_OF = {"full": BLOCKS, "lora": 56}
"""Of the model of each method, so that it trains at least 1,000 tensors."""
WIDTH = 2048
"""48 blocks of this width have 2.2 billion parameters: weights, gradients and moments in bfloat16
take 18 GB."""
RANK = 16
WARMUP = 5
FLAT, TABLE_GRAPH = "flat fused", "table graph"
Make = Callable[[list[ParamGroup]], Optimizer]
ARMS: dict[str, tuple[Make, str]] = {
    "groups": (fused_adamw, "groups"),
    "segmented": (fused_adamw, "segmented"),
    "table": (TableAdamW, "groups"),
    "table segmented": (TableAdamW, "segmented"),
    TABLE_GRAPH: (lambda groups: TableAdamW(groups, capturable=True), "groups"),
}
Row = dict[str, Any]


def main(args: argparse.Namespace) -> None:
    """Measure full finetunes and adapters at both numbers of rates, and write the result."""
    if not torch.cuda.is_available():
        sys.exit(
            "step_cost.py: error: Invalid --device=cuda: this torch sees no CUDA device. Leave it"
            " out to measure the sharders on the CPU."
        )
    device = torch.device("cuda")
    rows: list[Row] = []
    for method in args.methods:
        model = make_model(method, BLOCKS_OF[method], args.width, device)
        for rates in RATES:
            rows.append(compare(model, rates, args.rounds))
            rows[-1]["method"] = method
            print(text_of(rows[-1]), flush=True)
        del model
    card = torch.cuda.get_device_name(device)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    result = {"device": card, "width": args.width, "rounds": args.rounds, **versions, "rows": rows}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def make_model(method: str, blocks: int, width: int, device: torch.device) -> nn.Module:
    """The toy transformer in bfloat16 with gradients; for `lora` with float32 adapters."""
    with device:
        model: nn.Module = Model(blocks, width).to(torch.bfloat16)
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["to_q", "to_k", "to_v", "to_out", "linear_in", "linear_out"]
        adapters = LoraConfig(r=RANK, target_modules=targets)
        # PEFT keeps adapters of bfloat16 weights in float32, as trainers do.
        model = get_peft_model(model, adapters).to(device)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)
    return model


def compare(model: nn.Module, rates: int, rounds: int) -> Row:
    """{arm: ms}, each with its optimizer made, measured and freed."""
    plan = make_plan(model, rates)
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    row: Row = {
        "rates": len({entry.lr for entry in plan.entries.values()}),
        "tensors": len(trained),
        "elements": sum(p.numel() for p in trained),
        FLAT: measure(AdamW(trained, lr=1e-5, fused=True).step, device, rounds),
    }
    for name, (make, emission) in ARMS.items():
        if name == TABLE_GRAPH and device.type != "cuda":
            continue
        optimizer = dist_layerlr.attach(plan, model, make, emission=emission)
        step: Callable[[], object] = optimizer.step
        if name == TABLE_GRAPH:
            step = captured(optimizer)
        row[name] = measure(step, device, rounds)
        del optimizer, step
    return row


def captured(optimizer: Optimizer) -> Callable[[], object]:
    """A replay of one step as a CUDA graph."""
    # A capture must find state, tables and the compiled kernel.
    for _ in range(WARMUP):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def measure(step: Callable[[], object], device: torch.device, rounds: int) -> dict[str, float]:
    """Medians in ms: until the device has done the step, and until the host is free."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    done: list[float] = []
    free: list[float] = []
    for number in range(WARMUP + rounds):
        wait()
        start = time.perf_counter()
        step()
        middle = time.perf_counter()
        wait()
        if number >= WARMUP:
            done.append(time.perf_counter() - start)
            free.append(middle - start)
    return {"ms": statistics.median(done) * 1e3, "host_ms": statistics.median(free) * 1e3}


def text_of(row: Row) -> str:
    """What was measured of one model and number of rates."""
    text = f"{row['method']}: {row['rates']} rates, {row['tensors']} tensors,"
    text += f" {row['elements'] / 1e9:.2f} billion elements\n"
    bar = row[FLAT]["ms"]
    for name in (FLAT, *ARMS):
        if name in row:
            ms, host = row[name]["ms"], row[name]["host_ms"]
            text += f"  {name:<16}{ms:>9.2f} ms {ms / bar:>6.2f} x flat   host {host:>8.2f} ms\n"
    return text
