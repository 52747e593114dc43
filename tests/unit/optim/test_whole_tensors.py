"""Optimizers that are given whole tensors: what comes in several rounds is stepped as in one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr import attach, plan_model
from dist_layerlr.optim import exchange

CONFIG = {
    "learning_rate": 1e-2,
    "per_layer_lr": {"enabled": True, "depth_strategy": "flat"},
    "optimizers": {"factored": {}, "adamw": "rest"},
}
MAKES = {"factored": torch.optim.Adafactor, "adamw": torch.optim.AdamW}
SIDE, STEPS = 8, 4


def make_model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [
        nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(SIDE, SIDE)})}) for _ in range(3)
    ]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


def trained(late: int | None = None) -> list[Tensor]:
    """Final weights; the matrix of block ``late`` gets its first gradient in the third step."""
    model = make_model()
    optimizer = attach(plan_model(model, CONFIG), model, MAKES, emission="segmented")
    for step in range(STEPS):
        for number, (name, param) in enumerate(model.named_parameters()):
            if late is None or step > 1 or not name.startswith(f"blocks.{late}."):
                generator = torch.Generator().manual_seed(10 * step + number)
                param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def test_several_rounds_end_where_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained()
    monkeypatch.setattr(exchange, "ROUND", SIDE * SIDE)
    assert all(map(torch.equal, trained(), one))


def test_a_gradient_that_comes_late_leaves_the_other_matrices_as_they_train_alone() -> None:
    whole, late = trained(), trained(late=2)
    pairs = list(zip(whole, late, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs[:4])
    assert not torch.equal(*pairs[4])
