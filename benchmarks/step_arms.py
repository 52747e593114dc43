"""What benchmarks/step_cost.py compares: a model, a plan of many rates, and one arm per optimizer.

`flat` is one rate with a foreach AdamW, which torch chooses by default on CUDA; `flat fused` is one
rate with ``fused=True``: the fastest AdamW of torch, and so the bar. `groups` and `segmented` give
every component of every block a rate of its own, with a fused AdamW inside.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer

import dist_layerlr
from dist_layerlr.sharders.base import ParamGroup
from toys import Model, wrap

WORLD = 2
BLOCKS, WIDTH, BATCH, TOKENS = 48, 96, 2, 16
FLAT, FLAT_FUSED, GROUPS, SEGMENTED = "flat", "flat fused", "groups", "segmented"
PLANNED = (GROUPS, SEGMENTED)
"""Emissions: the arms that train at the plan's rates."""
CONFIG = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, "unmatched": "default"}}
CELLS = 144
"""Components times blocks of the toy model: the number of rates of a real plan."""


@dataclass
class Arm:
    """One way to train, and the seconds that its measured steps took."""

    run: Callable[[], tuple[float, float]]
    """Trains one step; returns (whole step, optimizer step alone) in seconds."""
    whole: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)


def names_of_arms(sharder: str) -> list[str]:
    """The arms that a sharder can run: names in flat parameters cannot be told apart by groups."""
    return [FLAT, FLAT_FUSED, *((SEGMENTED,) if sharder == "fsdp1_flat" else PLANNED)]


def make_arm(sharder: str, method: str, name: str, rates: int = CELLS) -> Arm:
    """Build one arm: `flat`, `flat fused`, `groups` or `segmented`, of the method full or lora."""
    model = make_model(method)
    plan = make_plan(model, rates)
    build = _zero_arm if sharder.startswith("zero") else _native_arm
    return build(sharder, model, plan, name)


def make_model(method: str) -> nn.Module:
    """Build the toy model with the same weights for every arm, with adapters for `lora`."""
    torch.manual_seed(0)
    model = Model(BLOCKS, WIDTH)
    if method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    targets = ["to_q", "to_v", "linear_in"]
    config = LoraConfig(r=16, target_modules=targets, init_lora_weights=False)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted


def make_plan(model: nn.Module, rates: int) -> dist_layerlr.Plan:
    """A plan with ``rates`` distinct learning rates; neighbouring cells share one if there are few.

    A cell is one component of one block. Beyond 144 rates, parameters of one cell differ too.
    """
    plan = dist_layerlr.plan_model(model, CONFIG)
    cells: dict[Any, int] = {}
    for entry in plan.entries.values():
        cells.setdefault((entry.block, entry.component), len(cells))
    entries = {}
    for i, (name, entry) in enumerate(plan.entries.items()):
        if rates > CELLS:
            place = i * rates // len(plan.entries)
        else:
            place = cells[entry.block, entry.component] * rates // len(cells)
        entries[name] = replace(entry, lr=1e-5 * (1 + place))
    return replace(plan, entries=entries)


def fused_adamw(groups: list[ParamGroup]) -> Optimizer:
    """Build the optimizer that README recommends."""
    return AdamW(groups, fused=True)


def _native_arm(sharder: str, model: nn.Module, plan: dist_layerlr.Plan, name: str) -> Arm:
    """An arm under torch's own sharders."""
    model = wrap(sharder, model, WORLD)
    optimizer = _make_optimizer(model, plan, name)
    if name in PLANNED:
        dist_layerlr.verify(plan, model, optimizer)
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def run() -> tuple[float, float]:
        # A rank that comes late would else charge its delay to the other rank's collectives.
        dist.barrier()
        start = time.perf_counter()
        model(x).square().mean().backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        optimizer.zero_grad()
        return time.perf_counter() - start, end - middle

    return Arm(run)


def _zero_arm(sharder: str, model: nn.Module, plan: dist_layerlr.Plan, name: str) -> Arm:
    """An arm under DeepSpeed; `zero 2 offload` keeps the optimizer's state on the host."""
    import deepspeed

    zero: dict[str, Any] = {"stage": int(sharder.split()[1])}
    if "offload" in sharder:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    optimizer = _make_optimizer(model, plan, name)
    with contextlib.redirect_stdout(None):
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if name == SEGMENTED:
        dist_layerlr.bind(plan, engine)
    if name in PLANNED:
        dist_layerlr.verify(plan, engine)
    x = torch.randn(BATCH, TOKENS, WIDTH)

    def run() -> tuple[float, float]:
        # A rank that comes late would else charge its delay to the other rank's collectives.
        dist.barrier()
        start = time.perf_counter()
        engine.backward(engine(x).square().mean())
        middle = time.perf_counter()
        engine.step()
        end = time.perf_counter()
        return end - start, end - middle

    return Arm(run)


def _make_optimizer(model: nn.Module, plan: dist_layerlr.Plan, name: str) -> Optimizer:
    if name in PLANNED:
        return dist_layerlr.attach(plan, model, fused_adamw, emission=name)
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, lr=1e-4, fused=name == FLAT_FUSED, foreach=name == FLAT)
