"""Train one small transformer under any sharder, and say how far it ends from one unsharded
process.

The unsharded reference shares no code with the plan: rates, decay and groups are written out by
hand here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dist_layerlr import Plan, PlanSchedule, Schedule, verify
from dist_layerlr.optim import check_scheduler, read_back
from tests.support.cases import At, Outcomes, items_of, run_bodies
from tests.support.toys import Transformer

STEPS, GLOBAL_BATCH = 5, 8
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

    def body(self, at: At) -> Measured:
        return self.run()


def run_cases(
    cases: list[Case], request: pytest.FixtureRequest, before: Callable[[], None] | None = None
) -> dict[int, Outcomes]:
    """{number of ranks: outcomes} of the selected cases, one set of ranks for each number."""
    chosen = {
        item.callspec.params["case"].id
        for item in items_of(request)
        if hasattr(item, "callspec") and "case" in item.callspec.params
    }
    outcomes: dict[int, Outcomes] = {}
    for ranks in sorted({case.ranks for case in cases if case.id in chosen}):
        mine = {c.id: c.body for c in cases if c.ranks == ranks and c.id in chosen}
        outcomes[ranks] = run_bodies(mine, ranks, before)
    return outcomes


def check(case: Case, outcomes: dict[int, Outcomes]) -> None:
    """All ranks measured alike, and below the bar."""
    for rank, outcome in enumerate(outcomes[case.ranks].settle(case.id)):
        text = (
            f"{case.id}: {outcome.worst:.2e} at {outcome.name} (moved {outcome.moved:.1e}, bar"
            f" {outcome.bar:.1e})"
        )
        if rank == 0:
            print(text)
        assert outcome.worst <= outcome.bar, text
