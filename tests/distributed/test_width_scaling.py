"""Rates, decay and epsilon that follow from shapes hold under every sharder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_layerlr import verify
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import SHARDERS, Native, Zero, start_deepspeed
from tests.support.parity import DECAY, Recipe, Weights, batch, micro_batches
from tests.support.toys import HIDDEN, WIDTH

STEPS, EPS, LR, ALPHA = 3, 1e-3, 2e-3, 0.75
"""An epsilon as large as gradients are here, so that a wrong one is seen."""
WIDE, DEEP = 0.5, 3 / 6
"""Growth from the base, which is twice as wide and deep: exact in floating point."""
cases = Cases(before=start_deepspeed)


@functools.cache
def base(folder: Path) -> str:
    """The toy's names and shapes, twice as wide, with six blocks."""
    lines = []
    for name, param in Recipe().model().named_parameters():
        shape = "x".join(str(2 * n if n in (WIDTH, HIDDEN) else n) for n in param.shape)
        lines.append(f"{name}\t{shape}")
        if name.startswith("blocks.0."):
            lines += [f"blocks.{i}.{name[9:]}\t{shape}" for i in (3, 4, 5)]
    path = folder / "base.tsv"
    path.write_text("\n".join(lines))
    return str(path)


class Scaled(Recipe):
    """One flat rate, scaled by CompleteP."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        block = {"enabled": True, "default_lr": LR, "component_lr": {}, "weight_decay": DECAY}
        block |= {"depth_strategy": "flat", "unmatched": "default"}
        scaling = {"base": base(self.folder), "rule": "completep", "alpha": ALPHA, "eps": EPS}
        return {"per_layer_lr": block, "width_scaling": scaling}


def recipe(at: At, **fields: Any) -> Scaled:
    made = Scaled(**fields)
    object.__setattr__(made, "folder", at.folder)
    return made


def by_hand(name: str, param: torch.Tensor) -> dict[str, Any]:
    """The settings of a parameter, by the tables of the paper."""
    depth = DEEP if name.startswith("blocks.") else 1.0
    matrix = param.ndim > 1 and name != "patch.weight"  # its seven inputs stay seven
    width = WIDE if {WIDTH, HIDDEN} & {*param.shape} else 1.0
    return {
        "lr": LR * depth ** (ALPHA - 1) / (width if matrix else 1.0),
        "weight_decay": DECAY * (width if matrix else 1.0),
        "eps": EPS / width / (depth**ALPHA),
    }


@functools.cache
def unsharded() -> Weights:
    model = Recipe().model()
    groups = [{"params": [p], **by_hand(n, p)} for n, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, foreach=False)
    for step in range(STEPS):
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trains(driver: Any) -> None:
    verify(driver.plan, driver.model, driver.optimizer)
    for step in range(STEPS):
        for x, y in micro_batches(step, 1):
            driver.backward(F.mse_loss(driver.model(x).float(), y))
        driver.step()
    verify(driver.plan, driver.model, driver.optimizer)
    full, wanted = driver.full(), unsharded()
    for name, value in wanted.items():
        assert float((full[name] - value).abs().max()) < 5e-6, name


def sharded(make: Callable[[At], Any], name: str) -> Callable[[Outcomes], None]:
    def body(at: At) -> None:
        trains(make(at))

    body.__name__ = f"test_weights_are_those_of_one_unsharded_process_under_{name}"
    return cases(body)


for _name, _wrap in SHARDERS.items():
    _made = sharded(lambda at, wrap=_wrap: Native(wrap, recipe(at)), _name)  # type: ignore[misc]
    globals()[_made.__name__] = _made
for _stage in (1, 2, 3):
    for _emission in ("groups", "segmented"):
        _made = sharded(
            lambda at, s=_stage, e=_emission: Zero(recipe(at, emission=e), s),  # type: ignore[misc]
            f"zero_{_stage}_{_emission}",
        )
        globals()[_made.__name__] = _made


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


@cases
def test_an_epsilon_that_was_overwritten_is_told(at: At) -> None:
    driver = Native(SHARDERS["ddp"], recipe(at, emission="groups"))
    driver.optimizer.param_groups[1]["eps"] = 1e-8
    with pytest.raises(PlanMismatch, match="planned eps .*, live 1e-08"):
        verify(driver.plan, driver.model, driver.optimizer)


@cases
def test_an_optimizer_without_an_epsilon_is_refused(at: At) -> None:
    with pytest.raises(ConfigError, match="SGD has no epsilon"):
        Native(SHARDERS["ddp"], recipe(at, optimizer="sgd"))
