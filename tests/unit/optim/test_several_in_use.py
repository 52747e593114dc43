"""Several optimizers in one, as training scripts use them: edits, copies, closures, NaN."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr import PlanMismatch, attach, effect_check, plan_model, verify
from dist_layerlr.plan import Plan
from tests.support.several import MAKES, NET, net

CONFIG = {
    "learning_rate": 1e-2,
    "per_layer_lr": {"enabled": True, "depth_strategy": "flat", "unmatched": "default"},
    "optimizers": {"factored": {}, "adamw": "rest"},
}


def prepared(model: nn.Module | None = None) -> tuple[Plan, nn.Module, torch.optim.Optimizer]:
    model = net() if model is None else model
    plan = plan_model(model, NET.config)
    return plan, model, attach(plan, model, MAKES)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> list[Tensor]:
    for step in range(steps):
        optimizer.zero_grad()
        NET.loss(model, step, slice(None)).backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def halved(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["lr"] *= 0.5


def scheduled(optimizer: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])


@pytest.mark.parametrize("edit", [halved, scheduled])
def test_a_rate_for_one_of_the_optimizers_alone_is_refused_not_dropped(edit: Any) -> None:
    plan, model, optimizer = prepared()
    edit(optimizer)
    with pytest.raises(PlanMismatch, match="several multiples of the plan.*lr_multiplier"):
        verify(plan, model, optimizer)
    with pytest.raises(PlanMismatch, match="several multiples of the plan"):
        stepped(model, optimizer)


def test_a_pickled_optimizer_goes_on_as_the_one_it_was_made_of() -> None:
    _, model, optimizer = prepared()
    stepped(model, optimizer)
    twin = pickle.loads(pickle.dumps((model, optimizer)))
    assert all(map(torch.equal, stepped(*twin, 2), stepped(model, optimizer, 2)))


def test_fused_weights_whose_memory_is_not_in_order_train_as_those_in_order() -> None:
    """A checkpoint's transposed linear layers, taken over as views."""
    straight, turned = net(), net()
    for module in turned.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
    for model in (straight, turned):
        optimizer = prepared(model)[2]
        for number, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    assert all(map(torch.equal, turned.parameters(), straight.parameters()))


def test_a_step_on_nan_is_a_finding_and_no_failed_decomposition() -> None:
    plan, model, optimizer = prepared()
    for param in model.parameters():
        param.grad = torch.full_like(param, float("nan"))
    with pytest.raises(PlanMismatch, match=r"qkv.weight: the step moved it to what is NaN"):
        with effect_check(plan, model, optimizer):
            optimizer.step()


def test_decay_that_is_edited_while_training_reaches_optimizers_on_whole_tensors() -> None:
    def moved(decay: float) -> Tensor:
        model = net()
        makes = {"factored": torch.optim.Adafactor, "adamw": torch.optim.AdamW}
        optimizer: Any = attach(plan_model(model, CONFIG), model, makes, emission="segmented")
        stepped(model, optimizer)
        for group in optimizer.inner.param_groups:
            group["weight_decay"] = decay
        stepped(model, optimizer)
        return dict(model.named_parameters())["blocks.0.attn.proj.weight"].detach()

    assert not torch.equal(moved(0.0), moved(10.0))


class Grouped(nn.Module):
    """Attention whose query is wider than the model: 16 + 4 + 4 rows, as many as 3 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = nn.Linear(8, 24), nn.Linear(16, 8)


def test_few_keys_beside_a_wide_query_are_not_taken_for_three_equal_parts() -> None:
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"self_attn": Grouped()}) for _ in range(2)])}
    )
    plan = plan_model(model, {**CONFIG, "optimizers": {"muon": {}, "adamw": "rest"}})
    assert plan.entries["layers.0.self_attn.qkv_proj.weight"].parts == (16, 4, 4)
