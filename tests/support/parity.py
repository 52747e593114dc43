"""Train one small transformer under any sharder, and say how far it ends from one unsharded
process.

The unsharded reference shares no code with the plan: rates, decay and groups are written out by
hand here.
"""

from __future__ import annotations

import functools
import gc
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dist_layerlr import Plan, PlanSchedule, Schedule, verify
from dist_layerlr.optim import check_scheduler, read_back
from ranks import run_ranks

WIDTH, HIDDEN, STEPS, GLOBAL_BATCH = 19, 37, 5, 8
RATES = {"self_attn": 4e-3, "ffn": 1e-3, "norm": 2e-3, "default": 3e-4}
DEPTH = (1.0, 0.75, 0.5)
LORA_PLUS, DECAY = 4.0, 0.1
LAYERED = {
    "enabled": True,
    "component_lr": {k: v for k, v in RATES.items() if k != "default"},
    "default_lr": RATES["default"],
    "depth_strategy": "linear",
    "min_depth_factor": 0.5,
    "no_decay": ["ndim<=1"],
    "lora_plus_ratio": LORA_PLUS,
    "unmatched": "default",
}
ADAMW, SGD, LORA = 5e-6, 1e-7, 1e-5
"""Largest difference of any element of any parameter after 5 steps that counts as the same
training, fp32."""
Weights = dict[str, torch.Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_out(torch.tanh(self.to_q(x)) * torch.sigmoid(self.to_k(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn1 = Attention()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Frozen(nn.Linear):
    """A class of its own, so that FSDP1 can flatten it alone."""


class Transformer(nn.Module):
    """No size divides by two ranks; ``gate`` leaves all but one rank without a shard."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(7, WIDTH)
        self.still = Frozen(WIDTH, WIDTH).requires_grad_(False)
        self.tie_a, self.tie_b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tie_b.weight = self.tie_a.weight
        self.gate = nn.Parameter(torch.full((1,), 0.3))
        self.blocks = nn.ModuleList([Block() for _ in DEPTH])
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tie_b(torch.tanh(self.tie_a(self.still(self.patch(x)))))
        for block in self.blocks:
            x = block(x)
        return self.last(x * self.gate)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, whatever shards it."""

    optimizer: str = "adamw"
    accumulate: int = 1
    clip: float | None = None
    schedule: str = "cosine"
    """`linear`, `cosine`: PlanSchedule. `lambda`: torch's LambdaLR."""
    lora: bool = False
    emission: str = "auto"
    layered: bool = True
    """False: one rate for everything, the largest of the plan."""

    @property
    def bar(self) -> float:
        return LORA if self.lora else SGD if self.optimizer == "sgd" else ADAMW

    @property
    def config(self) -> dict[str, Any]:
        off = {"enabled": False}
        return {
            "learning_rate": max(RATES.values()),
            "per_layer_lr": LAYERED if self.layered else off,
        }

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model: Any = Transformer()
        if self.lora:
            settings = peft.LoraConfig(
                r=3, lora_alpha=6, target_modules=["to_q", "to_out", "ffn.0"]
            )
            model = peft.get_peft_model(model, settings)
        return model

    def make(self, groups: Any) -> torch.optim.Optimizer:
        """The optimizer, on the plan's groups or on the reference's."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=DECAY)
        how = {"adamw": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[
            self.optimizer
        ]
        return torch.optim.AdamW(groups, lr=1.0, weight_decay=DECAY, **how)

    def factor(self, step: int) -> float:
        """Multiplier of optimizer step ``step``."""
        return (
            1.0 / (1.0 + 0.3 * step)
            if self.schedule == "lambda"
            else self.plan_schedule.factor(step)
        )

    @property
    def plan_schedule(self) -> Schedule:
        return Schedule(kind=self.schedule, warmup_steps=2, total_steps=STEPS + 1, min_ratio=0.1)

    def wanted(self) -> dict[str, tuple[float, float]]:
        """{name: (lr, weight decay)} of everything that trains, by hand."""
        return {
            n: self.settings(n, p) for n, p in self.model().named_parameters() if p.requires_grad
        }

    def settings(self, name: str, param: nn.Parameter) -> tuple[float, float]:
        if not self.layered:
            return max(RATES.values()), DECAY
        block = re.search(r"blocks\.(\d)\.", name)
        key = next(
            (
                c
                for part, c in (("attn1", "self_attn"), ("ffn", "ffn"), ("norm", "norm"))
                if part in name
            ),
            None,
        )
        rate = RATES[key or "default"] * (DEPTH[int(block[1])] if block else 1.0)
        return rate * (LORA_PLUS if "lora_B" in name else 1.0), DECAY if param.ndim > 1 else 0.0


def plain_name(name: str) -> str:
    """The canonical name of an unwrapped model's parameter, by hand."""
    return name.removeprefix("base_model.model.")


def no_worse_than_flat(train: Callable[[Recipe], Measured], recipe: Recipe) -> Measured:
    """Where mixed precision rules out the bars: the bar is what one flat rate loses in the same
    arithmetic."""
    flat = train(replace(recipe, layered=False))
    return train(recipe)._replace(bar=flat.worst)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(GLOBAL_BATCH, 7, generator=generator), torch.randn(
        GLOBAL_BATCH, 3, generator=generator
    )


def micro_batches(step: int, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of a global batch, in ``count`` pieces."""
    share = GLOBAL_BATCH // dist.get_world_size()
    mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    x, y = batch(step)
    yield from zip(x[mine].chunk(count), y[mine].chunk(count), strict=True)


@functools.cache
def reference(recipe: Recipe) -> Weights:
    """Weights of one unsharded process on the global batch: a group per parameter, torch only."""
    model = recipe.model()
    groups: list[dict[str, Any]] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            rate, decay = recipe.settings(name, param)
            groups.append({"params": [param], "weight_decay": decay, "rate": rate})
    optimizer = recipe.make(groups)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * recipe.factor(step)
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {plain_name(n): p.detach().clone() for n, p in model.named_parameters()}


class Driver(Protocol):
    """A sharded model in training."""

    plan: Plan
    model: Any
    optimizer: Any
    """What `verify` takes; None: the model brings its own."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> None: ...

    def full(self) -> Weights:
        """Whole weights by plain names; collective."""
        ...


class Measured(NamedTuple):
    """How far a sharded model ends from the unsharded one."""

    worst: float
    name: str
    moved: float
    """Largest change of any weight over the training."""
    bar: float
    """Largest ``worst`` that counts as the same training."""


def measure(driver: Driver, recipe: Recipe, scheduler: Any = None) -> Measured:
    """Train, prove the rates before and after, and compare all weights.

    Args:
        driver: the sharded model.
        recipe: what the driver was made from.
        scheduler: a torch scheduler that the driver steps; None: PlanSchedule.
    """
    if scheduler is not None:
        check_scheduler(scheduler)
    live = driver.optimizer if driver.optimizer is not None else driver.model
    ours = PlanSchedule(live, recipe.plan_schedule) if scheduler is None else None
    prove(driver, recipe, 0)
    for step in range(STEPS):
        for part, (x, y) in enumerate(micro_batches(step, recipe.accumulate), 1):
            with driver.micro_step(last=part == recipe.accumulate):
                driver.backward(F.mse_loss(driver.model(x).float(), y))
        driver.step()
        if ours is not None:
            ours.step()
    prove(driver, recipe, STEPS)
    return compare(driver.full(), recipe)


def prove(driver: Driver, recipe: Recipe, step: int) -> None:
    """The plan's rates and decays are in force, by `verify` and by hand."""
    proof = verify(driver.plan, driver.model, driver.optimizer, factor=recipe.factor(step))
    wanted = {
        plain_name(n): pytest.approx((rate * recipe.factor(step), decay), rel=1e-9)
        for n, (rate, decay) in recipe.wanted().items()
    }
    live = {n: (p.lr, p.weight_decay) for n, p in read_back(driver.model, driver.optimizer).items()}
    assert live == wanted, {
        n: (live.get(n), wanted.get(n))
        for n in live.keys() | wanted
        if live.get(n) != wanted.get(n)
    }
    assert (proof.ranks, proof.parameters) == (dist.get_world_size(), len(wanted))
    assert not recipe.layered or len({lr for lr, _ in live.values()}) >= 3


def compare(full: Weights, recipe: Recipe) -> Measured:
    start = {plain_name(n): p.detach() for n, p in recipe.model().named_parameters()}
    wanted = reference(recipe)
    assert full.keys() == wanted.keys(), full.keys() ^ wanted.keys()
    off = {n: float((full[n].float() - wanted[n]).abs().max()) for n in wanted}
    worst = max(off, key=lambda n: off[n])
    return Measured(
        off[worst],
        worst,
        max(float((wanted[n] - start[n]).abs().max()) for n in wanted),
        recipe.bar,
    )


class Case(NamedTuple):
    """One training, on one number of ranks."""

    name: str
    ranks: int
    run: Callable[[], Measured]

    @property
    def id(self) -> str:
        return f"{self.name}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


Outcome = Measured | str
"""A measurement, or the traceback."""


def run_cases(
    cases: list[Case], request: pytest.FixtureRequest, before: Callable[[], None] | None = None
) -> dict[str, list[Outcome]]:
    """{id: outcome by rank} of the selected cases: one set of ranks for each number of ranks."""
    items = [
        i
        for i in request.session.items
        if isinstance(i, pytest.Function) and i.module is request.module
    ]
    chosen = {
        i.callspec.params["case"].id
        for i in items
        if hasattr(i, "callspec") and "case" in i.callspec.params
    }
    outcomes: dict[str, list[Outcome]] = {}
    for ranks in sorted({case.ranks for case in cases if case.id in chosen}):
        mine = [case for case in cases if case.ranks == ranks and case.id in chosen]
        by_rank = run_ranks(_on_rank, ranks, mine, before, deadline_s=300.0)
        outcomes.update({case.id: [found[case.id] for found in by_rank] for case in mine})
    return outcomes


def _on_rank(
    rank: int, world_size: int, cases: list[Case], before: Callable[[], None] | None
) -> dict[str, Outcome]:
    gc.freeze()  # DeepSpeed collects garbage often, and the parent's imports are most of the heap
    if before is not None:
        before()
    outcomes: dict[str, Outcome] = {}
    for case in cases:
        try:
            outcomes[case.id] = case.run()
        except Exception:
            outcomes[case.id] = traceback.format_exc()
        if not _together(case.id, isinstance(outcomes[case.id], Measured)):
            rest = {c.id: f"not run: the ranks parted in {case.id!r}" for c in cases}
            return {**rest, **outcomes}
    return outcomes


def _together(name: str, good: bool) -> bool:
    """Whether all ranks ended a case alike; if not, their next collectives would not fit
    together."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{dist.get_rank()}", str(good))
    keys = [f"{name}/{rank}" for rank in range(dist.get_world_size())]
    try:
        store.wait(keys, timedelta(seconds=15))
    except RuntimeError:
        return False
    return len({store.get(key) for key in keys}) == 1


def check(case: Case, outcomes: list[Outcome]) -> None:
    """All ranks measured alike, and below the bar."""
    for rank, outcome in enumerate(outcomes):
        if not isinstance(outcome, Measured):
            pytest.fail(f"{case.id}: rank {rank}\n{outcome}", pytrace=False)
        text = (
            f"{case.id}: {outcome.worst:.2e} at {outcome.name} (moved {outcome.moved:.1e}, bar"
            f" {outcome.bar:.1e})"
        )
        if rank == 0:
            print(text)
        assert outcome.worst <= outcome.bar, text
