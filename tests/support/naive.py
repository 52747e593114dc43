"""The groups that a user would write by hand for `toys.Toy`, and what its training really did."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_layerlr import Plan, attach, plan_model
from tests.support.toys import Toy

RATES = {"self_attn": 4e-3, "ffn": 1e-3, "default": 3e-4}
BLOCK = {
    "enabled": True,
    "component_lr": {"self_attn": RATES["self_attn"], "ffn": RATES["ffn"]},
    "default_lr": RATES["default"],
    "depth_strategy": "flat",
    "unmatched": "default",
}
CONFIG = {"per_layer_lr": BLOCK}
"""The same three rates that `naive_groups` gives to an unwrapped model."""


def make_model(blocks: int = 3) -> Toy:
    torch.manual_seed(0)
    return Toy(blocks)


def config(**changes: Any) -> dict[str, Any]:
    """CONFIG with some fields of its block changed."""
    return {"per_layer_lr": {**BLOCK, **changes}}


def naive_component(name: str) -> str:
    """What a user writes who has seen the names of the unwrapped model."""
    if ".attn." in name:
        return "self_attn"
    return "ffn" if ".mlp." in name else "default"


def naive_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Groups by substrings of whatever names are there; groups without members are left out."""
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in RATES}
    for name, param in named:
        if param.requires_grad:
            groups[naive_component(name)].append(param)
    return [
        {"params": params, "lr": RATES[key], "name": key}
        for key, params in groups.items()
        if params
    ]


def adamw(groups: Any) -> torch.optim.Optimizer:
    """No weight decay, so the first update of each element is its learning rate."""
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1.0)


def batch(
    step: int, rank: int | None = None, world_size: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, or the part of one rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 3, generator=generator)
    if rank is None:
        return x, y
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    return x[part], y[part]


def backward(model: nn.Module, step: int, rank: int | None = None) -> None:
    x, y = batch(step, rank)
    F.mse_loss(model(x), y).backward()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int | None = None, steps: int = 1
) -> None:
    for step in range(steps):
        backward(model, step, rank)
        optimizer.step()
        optimizer.zero_grad()


def fill_grads(model: nn.Module) -> None:
    """Gradients without a backward pass, which a process that will fork must not run."""
    generator = torch.Generator().manual_seed(7)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


Weights = dict[str, torch.Tensor]


def copy_of(model: nn.Module) -> Weights:
    """Weights of an unsharded model."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def movement(before: Weights, after: Weights) -> dict[str, float]:
    """Largest change of each name."""
    assert before.keys() == after.keys()
    return {name: float((after[name] - before[name]).abs().max()) for name in before}


def observed_rates(before: Weights, after: Weights) -> dict[str, float]:
    """The learning rate that the first AdamW step really used: the median change of each name."""
    assert before.keys() == after.keys()
    return {name: float((after[name] - before[name]).abs().median()) for name in before}


def wanted_rates(model: nn.Module | None = None) -> dict[str, float]:
    """Learning rate of each name, as `naive_groups` and CONFIG both mean it."""
    return {
        name: RATES[naive_component(name)] for name, _ in (model or make_model()).named_parameters()
    }


def close(got: dict[str, float], wanted: dict[str, float], rel: float = 2e-2) -> bool:
    return got == pytest.approx(wanted, rel=rel)


def farthest(a: Weights, b: Weights) -> float:
    """Largest difference of any element."""
    return max(movement(a, b).values())


def step_on_filled_grads(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    fill_grads(model)
    optimizer.step()
    optimizer.zero_grad()


def planned(model: nn.Module, rule: Any = CONFIG) -> tuple[Plan, torch.optim.Optimizer]:
    plan = plan_model(model, rule)
    return plan, attach(plan, model, adamw)
