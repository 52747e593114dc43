"""A plan that unfreezes block by block equals hand-made runs with ``requires_grad`` toggled.

The runs by hand share no code with the plan: gradients are averaged by hand, each phase has an
AdamW or SGD of its own on what trains in it, and what trains on keeps its state.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_layerlr import (
    PlanSchedule,
    Schedule,
    effect_check,
    load_checkpoint,
    save_checkpoint,
    verify,
)
from dist_layerlr.optim import optimizer_state
from dist_layerlr.plan import canonical_name
from dist_layerlr.proof import steer
from tests.support.cases import At, Outcomes, items_of, run_bodies
from tests.support.drivers import SHARDERS, Native, Zero, start_deepspeed
from tests.support.parity import Driver, Recipe, Weights, micro_batches

STEPS, EVERY, RAMP, UNTIL, SAVED = 10, 3, 2, 8, 4
"""Saved inside the ramp of the block that starts at step 3."""
SCHEDULE = Schedule(kind="cosine", warmup_steps=1, total_steps=STEPS, min_ratio=0.1)
CLIPPED = 1e-6
"""A norm is a sum in another order where shards have other shapes."""


@dataclass(frozen=True, kw_only=True)
class Timed(Recipe):
    """Norms of blocks stop at a step; blocks are unfrozen from the last to the first."""

    @property
    def config(self) -> dict[str, Any]:
        config = super().config
        rules = [
            {"match": "blocks", "components": ["norm"], "until": UNTIL},
            {"match": "blocks", "ramp": RAMP, "unfreeze": {"every": EVERY, "start": "last"}},
        ]
        return {**config, "per_layer_lr": {**config["per_layer_lr"], "timing": rules}}


def by_hand(name: str, step: int) -> float | None:
    """What the rate of a name is multiplied by at a step; None: it needs no gradient."""
    run = SCHEDULE.factor(step)
    block = re.match(r"blocks\.(\d)\.", name)
    if block is None:
        return run
    if "norm" in name:
        return run if step < UNTIL else None
    since = step - EVERY * (2 - int(block[1]))
    return None if since < 0 else run * min(1.0, (since + 1) / RAMP)


def unchanged(name: str, step: int) -> float:
    return 1.0


def reference(recipe: Recipe, times: Callable[[str, int], float] = unchanged) -> Weights:
    model = recipe.model()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    state: dict[Any, Any] = {}
    optimizer: Any = None
    names: list[str] = []
    for step in range(STEPS):
        now = [name for name in trained if by_hand(name, step) is not None]
        if now != names:
            names = now
            for name, param in trained.items():
                param.requires_grad_(name in now)
            groups = []
            for name in now:
                rate, decay = recipe.settings(name, trained[name])
                groups.append({"params": [trained[name]], "weight_decay": decay, "rate": rate})
            optimizer = recipe.make(groups)
            optimizer.state.update({trained[n]: state[n] for n in now if n in state})
        for group, name in zip(optimizer.param_groups, names, strict=True):
            factor = by_hand(name, step)
            assert factor is not None
            group["lr"] = group["rate"] * times(name, step) * factor
        for x, y in micro_batches(step, 1):
            F.mse_loss(model(x), y).backward()
        for name in names:
            gradient = trained[name].grad
            assert gradient is not None
            gradient.div_(dist.get_world_size())
            dist.all_reduce(gradient)
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_([trained[n] for n in names], recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        state.update({n: optimizer.state[trained[n]] for n in names})
    return {n: p.detach().clone() for n, p in trained.items()}


DRIVERS: dict[str, Callable[[Recipe], Driver]] = {
    **{name: (lambda r, wrap=wrap: Native(wrap, r)) for name, wrap in SHARDERS.items()},
    "ddp, groups": lambda r: Native(SHARDERS["ddp"], replace(r, emission="groups")),
    "fsdp2, groups": lambda r: Native(SHARDERS["fsdp2"], replace(r, emission="groups")),
    **{
        f"zero {stage}, {emission}": (
            lambda r, stage=stage, emission=emission: Zero(replace(r, emission=emission), stage)
        )
        for stage, emission in ((1, "segmented"), (2, "segmented"), (2, "groups"), (3, "segmented"))
    },
}


def begin(name: str, recipe: Recipe) -> tuple[Driver, PlanSchedule]:
    driver = DRIVERS[name](recipe)
    live = driver.optimizer if driver.optimizer is not None else driver.model
    return driver, PlanSchedule(live, SCHEDULE)


def advance(driver: Driver, schedule: PlanSchedule, steps: int) -> None:
    for _ in range(steps):
        at = schedule.last_step
        proof = verify(driver.plan, driver.model, driver.optimizer, step=at)
        assert (proof.step, proof.step_factor) == (at, pytest.approx(SCHEDULE.factor(at)))
        for x, y in micro_batches(at, 1):
            with driver.micro_step(last=True):
                loss = F.mse_loss(driver.model(x), y)
                with effect_check(driver.plan, driver.model, driver.optimizer):
                    driver.backward(loss)
                    driver.step()
        schedule.step()


def distance(
    driver: Driver, recipe: Recipe, times: Callable[[str, int], float] = unchanged
) -> tuple[float, str]:
    full, wanted = driver.full(), reference(recipe, times)
    return max((float((full[n] - wanted[n]).abs().max()), n) for n in wanted)


def counted(driver: Driver) -> dict[str, float]:
    return {
        canonical_name(name): float(span.tensors["step"])
        for name, spans in optimizer_state(driver.model, driver.optimizer).items()
        for span in spans
        if "step" in span.tensors
    }


def trains(name: str, recipe: Recipe) -> Callable[[At], Any]:
    def body(at: At) -> tuple[float, str]:
        driver, schedule = begin(name, recipe)
        advance(driver, schedule, STEPS)
        for held, steps in counted(driver).items():
            assert steps in (0, sum(by_hand(held, s) is not None for s in range(STEPS))), held
        return distance(driver, recipe)

    return body


def resumes(source: str, target: str) -> Callable[[At], Any]:
    def body(at: At) -> tuple[float, str]:
        recipe = Timed()
        driver, schedule = begin(source, recipe)
        advance(driver, schedule, SAVED)
        extra = {"schedule": schedule}
        save_checkpoint(
            at.folder, driver.plan, driver.model, driver.optimizer, step=SAVED, extra=extra
        )
        driver, schedule = begin(target, recipe)
        extra = {"schedule": schedule}
        load_checkpoint(at.folder, driver.plan, driver.model, driver.optimizer, extra=extra)
        assert schedule.last_step == SAVED
        advance(driver, schedule, STEPS - SAVED)
        return distance(driver, recipe)

    return body


STEERED = re.compile(r"blocks\.\d\.(ffn\.0|norm1)\.")
"""What is at half its rate from step 4 to step 8: also inside a ramp, and held.

Norms lie beside norms in a flat tensor, so that it is cut into more views than before."""


def halved(name: str, step: int) -> float:
    return 0.5 if STEERED.match(name) and 4 <= step < 8 else 1.0


def is_steered(name: str) -> Callable[[At], Any]:
    def body(at: At) -> tuple[float, str]:
        recipe = Timed()
        driver, schedule = begin(name, recipe)
        parts = [{"match": "blocks.*.ffn.0"}, {"match": "blocks.*.norm1"}]
        for steps, by in ((4, 0.5), (4, 2.0)):
            advance(driver, schedule, steps)
            changes = {"scale": [{**part, "by": by} for part in parts]}
            driver.plan = steer(driver.plan, driver.model, driver.optimizer, changes=changes)
        advance(driver, schedule, STEPS - 8)
        for held, steps in counted(driver).items():
            assert steps in (0, sum(by_hand(held, s) is not None for s in range(STEPS))), held
        return distance(driver, recipe, halved)

    return body


BODIES: dict[str, Callable[[At], Any]] = {
    **{f"{name}, AdamW": trains(name, Timed()) for name in DRIVERS},
    **{f"{name}, SGD": trains(name, Timed(optimizer="sgd")) for name in DRIVERS},
    **{
        f"{name}, clipped": trains(name, Timed(clip=0.01))
        for name in ("ddp", "fsdp1_flat", "fsdp2", "zero 2, segmented", "zero 3, segmented")
    },
    **{
        f"{name}, steered": is_steered(name)
        for name in ("ddp", "fsdp1_flat", "fsdp2", "zero 2, segmented", "zero 3, segmented")
    },
    "fsdp2 -> fsdp2": resumes("fsdp2", "fsdp2"),
    "zero 2, segmented -> zero 2, segmented": resumes("zero 2, segmented", "zero 2, segmented"),
    "zero 2, segmented -> ddp": resumes("zero 2, segmented", "ddp"),
    "fsdp2 -> zero 3, segmented": resumes("fsdp2", "zero 3, segmented"),
    "ddp -> fsdp1_flat": resumes("ddp", "fsdp1_flat"),
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    chosen = {item.callspec.params["case"] for item in items_of(request)}
    bodies = {case: body for case, body in BODIES.items() if case in chosen}
    return run_bodies(bodies, 2, start_deepspeed)


@pytest.mark.parametrize("case", BODIES)
def test_gradual_unfreezing_equals_runs_with_requires_grad_toggled_by_hand(
    case: str, outcomes: Outcomes
) -> None:
    bar = CLIPPED if "clipped" in case else 0.0
    for worst, name in outcomes.settle(case):
        assert worst <= bar, f"{case}: {worst:.2e} at {name}"
