"""One group outside, per-name rates inside: equal to ordinary groups, for any elementwise optimizer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dist_layerlr as dl

CONFIG: dict[str, Any] = {
    "learning_rate": 3e-4,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-3, "ffn": 1e-3, "norm": 5e-4},
        "no_decay": ["ndim<=1"],
    },
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda g: torch.optim.SGD(g, lr=1.0, momentum=0.9, weight_decay=0.1),
    "SGD without momentum": lambda g: torch.optim.SGD(g, lr=1.0),
    "AdamW": lambda g: torch.optim.AdamW(g, weight_decay=0.1),
    "AdamW foreach": lambda g: torch.optim.AdamW(g, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda g: torch.optim.AdamW(g, weight_decay=0.1, fused=True),
    "Adam amsgrad": lambda g: torch.optim.Adam(g, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.attn = nn.ModuleDict({"to_q": nn.Linear(5, 5), "to_k": nn.Linear(5, 5)})
        self.mlp = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.attn["to_q"](self.norm(x))) * self.attn["to_k"](x)
        return x + self.mlp(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.Sequential(Block(), Block(), Block()), "head": nn.Linear(5, 1)})


def gradients(net: Any, step: int) -> None:
    """Gradients without a backward pass, which forked ranks of later tests would not survive."""
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def train(emission: str, make: Callable[..., torch.optim.Optimizer], steps: int = 20) -> dict[str, torch.Tensor]:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, make, emission=emission)
    schedule = dl.PlanSchedule(optimizer, dl.Schedule(kind="cosine", warmup_steps=2, total_steps=steps))
    for step in range(steps):
        gradients(net, step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        dl.verify(plan, net, optimizer, factor=schedule.factor)
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_segmented_equals_groups_bitwise_on_whole_parameters(name: str) -> None:
    groups, segmented = train("groups", OPTIMIZERS[name]), train("segmented", OPTIMIZERS[name])
    assert all(torch.equal(groups[n], segmented[n]) for n in groups)


def test_a_flat_tensor_cut_into_slices_trains_like_its_parts() -> None:
    """As a sharder does it: one flat tensor with padding and a frozen run between the slices."""
    from dist_layerlr.segmented import Segmented, Slice

    net = model()
    plan = dl.plan_model(net, CONFIG)
    parts = dict(net.named_parameters())
    numels = {n: p.numel() for n, p in parts.items()}
    gap = 3
    flat = nn.Parameter(
        torch.cat([torch.cat([p.detach().reshape(-1), torch.full((gap,), 9.0)]) for p in parts.values()])
    )
    slices, offset = [], 0
    for name, numel in numels.items():
        slices.append(Slice(name=name, owner=flat, offset=offset, numel=numel))
        offset += numel + gap
    optimizer = Segmented(plan, [flat], OPTIMIZERS["AdamW fused"], slices)
    schedule = dl.PlanSchedule(optimizer, dl.Schedule(kind="cosine", warmup_steps=2, total_steps=20))
    for step in range(20):
        gradients(net, step)
        flat.grad = torch.cat([torch.cat([p.grad.reshape(-1), torch.ones(gap)]) for p in parts.values()])  # type: ignore[union-attr]
        optimizer.step()
        schedule.step()
    reference = train("groups", OPTIMIZERS["AdamW fused"])
    for piece in slices:
        got = flat.detach()[piece.offset : piece.offset + piece.numel]
        torch.testing.assert_close(got, reference[piece.name].reshape(-1), rtol=1e-7, atol=0)
        assert torch.equal(flat.detach()[piece.offset + piece.numel :][:gap], torch.full((gap,), 9.0))
    assert optimizer.state[flat]["exp_avg"].shape == flat.shape


def test_the_sharder_sees_one_group_and_no_scheduler_can_flatten_the_rates() -> None:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    assert len(optimizer.param_groups) == 1
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * 0.25  # what any scheduler can do to it
    live = dl.read_back(net, optimizer)
    assert {n: p.lr for n, p in live.items()} == pytest.approx({n: 0.25 * e.lr for n, e in plan.entries.items()})


def test_state_is_saved_on_the_outer_tensors_and_loads_into_the_slices() -> None:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    first = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    gradients(net, 0)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    gradients(net, 1)
    first.step()
    straight = {n: p.detach().clone() for n, p in net.named_parameters()}

    resumed = model()
    resumed.load_state_dict(weights)
    second = dl.attach(plan, resumed, OPTIMIZERS["AdamW"], emission="segmented")
    second.load_state_dict(saved)
    gradients(resumed, 1)
    second.step()
    assert all(torch.equal(p, straight[n]) for n, p in resumed.named_parameters())


def test_memory_besides_the_state_does_not_grow_with_the_elements() -> None:
    def elements() -> int:
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _is_tensor(t)
        }
        return sum(storages.values())

    net = model()
    plan = dl.plan_model(net, CONFIG)
    gradients(net, 0)
    before = elements()
    optimizer = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    names = len(plan.entries)
    assert elements() - before <= 8 * names
    optimizer.step()
    state = 2 * sum(p.numel() * 4 for p in net.parameters())
    assert elements() - before <= state + 64 * names


def _is_tensor(thing: object) -> bool:
    return type(thing) in (torch.Tensor, nn.Parameter)


def test_stepping_tensors_that_were_never_bound_is_an_error() -> None:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    stranger = nn.Parameter(torch.zeros(3))
    stranger.grad = torch.ones(3)
    optimizer.param_groups[0]["params"] = [stranger]
    with pytest.raises(dl.PlanMismatch, match="bind"):
        optimizer.step()


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    gradients(net, 0)
    net.get_parameter("head.weight").grad = None
    before = net.get_parameter("head.weight").detach().clone()
    optimizer.step()
    assert torch.equal(net.get_parameter("head.weight"), before)


def test_reapply_after_a_load_puts_the_outer_multiplier_back_too() -> None:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    first = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    for group in first.param_groups:
        group["lr"] = group["initial_lr"] * 0.25  # saved in the middle of a schedule
    second = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    dl.reapply(plan, net, second, factor=0.5)
    dl.verify(plan, net, second, factor=0.5)
    gradients(net, 0)
    with dl.effect_check(plan, net, second, factor=0.5) as observed:
        second.step()
    assert observed["blocks.0.attn.to_q.weight"] == pytest.approx(0.5 * 4e-3, rel=0.02)
