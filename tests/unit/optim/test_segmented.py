"""One group outside, per-name rates inside: equal to ordinary groups, for any elementwise
optimizer."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dist_layerlr as dl
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.sharders.base import Slice
from tests.support.living import living_bytes, only_new_tensors
from tests.support.optimizers import adagrad_needs_its_constructor

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
    return nn.ModuleDict(
        {"blocks": nn.Sequential(Block(), Block(), Block()), "head": nn.Linear(5, 1)}
    )


def gradients(net: Any, step: int) -> None:
    """Gradients without a backward pass, which forked ranks of later tests would not survive."""
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def train(
    emission: str, make: Callable[..., torch.optim.Optimizer], steps: int = 20
) -> dict[str, torch.Tensor]:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, make, emission=emission)
    schedule = dl.PlanSchedule(
        optimizer, dl.Schedule(kind="cosine", warmup_steps=2, total_steps=steps)
    )
    for step in range(steps):
        gradients(net, step)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        dl.verify(plan, net, optimizer, factor=schedule.factor)
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_segmented_equals_groups_bitwise_on_whole_parameters(name: str) -> None:
    if name == "Adagrad" and adagrad_needs_its_constructor():
        pytest.skip("this torch's Adagrad has no state outside its constructor")
    groups, segmented = train("groups", OPTIMIZERS[name]), train("segmented", OPTIMIZERS[name])
    assert all(torch.equal(groups[n], segmented[n]) for n in groups)


GAP = 3
"""Elements of padding, or of a frozen parameter, between names of a flat tensor."""


def flat_optimizer(
    net: nn.Module, make: Callable[..., torch.optim.Optimizer], gap: int = GAP
) -> Segmented:
    """As a sharder does it: one flat tensor, here with a gap after every name."""
    plan = dl.plan_model(net, CONFIG)
    slices, parts, offset = [], [], 0
    flat = nn.Parameter(torch.empty(sum(p.numel() + gap for p in net.parameters())))
    for name, param in net.named_parameters():
        slices.append(Slice(name=name, start=0, owner=flat, offset=offset, numel=param.numel()))
        parts += [param.detach().reshape(-1), torch.full((gap,), 9.0)]
        offset += param.numel() + gap
    flat.data = torch.cat(parts)
    return Segmented(plan, [flat], make, slices)


def flat_of(optimizer: Segmented) -> torch.Tensor:
    return optimizer.param_groups[0]["params"][0]  # type: ignore[no-any-return]


def flat_gradient(net: nn.Module, gap: int = GAP) -> torch.Tensor:
    return torch.cat([torch.cat([p.grad.reshape(-1), torch.ones(gap)]) for p in net.parameters()])  # type: ignore[union-attr]


def train_flat(
    make: Callable[..., torch.optim.Optimizer], gap: int = GAP, steps: int = 20
) -> dict[str, torch.Tensor]:
    net = model()
    optimizer = flat_optimizer(net, make, gap)
    flat = flat_of(optimizer)
    schedule = dl.PlanSchedule(
        optimizer, dl.Schedule(kind="cosine", warmup_steps=2, total_steps=steps)
    )
    for step in range(steps):
        gradients(net, step)
        flat.grad = flat_gradient(net, gap)
        optimizer.step()
        schedule.step()
    assert optimizer.state[flat]["exp_avg"].shape == flat.shape
    trained, offset = {}, 0
    for name, param in net.named_parameters():
        trained[name] = flat.detach()[offset : offset + param.numel()].view_as(param)
        assert torch.equal(flat.detach()[offset + param.numel() :][:gap], torch.full((gap,), 9.0))
        offset += param.numel() + gap
    return trained


@pytest.mark.parametrize("gap", [0, GAP], ids=["without gaps", "with gaps"])
@pytest.mark.parametrize("name", ["AdamW", "AdamW fused", "Adam amsgrad"])
def test_a_flat_tensor_cut_into_slices_trains_like_its_parts(name: str, gap: int) -> None:
    trained, reference = train_flat(OPTIMIZERS[name], gap), train("groups", OPTIMIZERS[name])
    for param, tensor in trained.items():
        # A fused kernel computes the last few elements of a tensor in scalar code, which rounds
        # differently.
        torch.testing.assert_close(tensor, reference[param], rtol=5e-7, atol=1e-8)


def test_names_that_lie_side_by_side_with_equal_settings_are_stepped_as_one() -> None:
    net = model()
    optimizer = flat_optimizer(net, OPTIMIZERS["AdamW"], gap=0)
    names, groups = [n for n, _ in net.named_parameters()], list(optimizer._plan.groups)
    group_of = {name: i for i, group in enumerate(groups) for name in group.names}
    runs = 1 + sum(group_of[a] != group_of[b] for a, b in zip(names, names[1:], strict=False))
    assert sum(len(group["params"]) for group in optimizer.inner.param_groups) == runs < len(names)  # type: ignore[union-attr]


def test_settings_other_than_the_rate_may_differ_by_group() -> None:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        for group in groups:
            if "norm" in group["name"]:
                group["betas"], group["eps"] = (0.5, 0.6), 1e-3
        return torch.optim.AdamW(groups, fused=True)

    plain = train("groups", lambda g: torch.optim.AdamW(g, fused=True))
    groups, segmented, flat = train("groups", make), train("segmented", make), train_flat(make)
    assert all(torch.equal(groups[n], segmented[n]) for n in groups)
    assert all(torch.allclose(groups[n], flat[n], rtol=5e-7, atol=1e-8) for n in groups)
    assert not torch.allclose(
        groups["blocks.0.norm.weight"], plain["blocks.0.norm.weight"], rtol=1e-3
    )


def test_a_gradient_that_first_comes_later_counts_its_own_steps() -> None:
    """The fused kernel shares step counters; a name without state must not make others count
    twice."""

    def late(emission: str) -> dict[str, torch.Tensor]:
        net = model()
        plan = dl.plan_model(net, CONFIG)
        optimizer = dl.attach(plan, net, OPTIMIZERS["AdamW fused"], emission=emission)
        for step in range(6):
            gradients(net, step)
            if step < 3:
                net.get_parameter("head.weight").grad = None
            optimizer.step()
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    groups, segmented = late("groups"), late("segmented")
    assert all(torch.equal(groups[n], segmented[n]) for n in groups)


def test_a_flat_tensor_whose_gradient_first_comes_later_leaves_shared_counters_right() -> None:
    """The slices of a flat tensor share a counter; torch's own step, which makes the late state,
    counts every slice."""
    net, late_from = model(), 3
    plan = dl.plan_model(net, CONFIG)
    names = [n for n, _ in net.named_parameters()]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    flats, slices = [], []
    for half in halves:
        flats.append(
            nn.Parameter(torch.cat([net.get_parameter(n).detach().reshape(-1) for n in half]))
        )
        offset = 0
        for name in half:
            slices.append(
                Slice(
                    name=name,
                    start=0,
                    owner=flats[-1],
                    offset=offset,
                    numel=net.get_parameter(name).numel(),
                )
            )
            offset += slices[-1].numel
    sliced = Segmented(plan, flats, OPTIMIZERS["AdamW fused"], slices)
    groups = dl.attach(plan, net, OPTIMIZERS["AdamW fused"], emission="groups")
    for step in range(6):
        gradients(net, step)
        for half, flat in zip(halves, flats, strict=True):
            flat.grad = torch.cat([net.get_parameter(n).grad.reshape(-1) for n in half])  # type: ignore[union-attr]
        if step < late_from:
            flats[1].grad = None
            for name in halves[1]:
                net.get_parameter(name).grad = None
        groups.step()
        sliced.step()
    assert [float(sliced.state[flat]["step"]) for flat in flats] == [6, 6 - late_from]
    for half, flat in zip(halves, flats, strict=True):
        wanted = torch.cat([net.get_parameter(n).detach().reshape(-1) for n in half])
        torch.testing.assert_close(flat.detach(), wanted, rtol=5e-7, atol=1e-8)


def test_state_of_a_flat_tensor_loads_into_its_slices() -> None:
    net = model()
    first = flat_optimizer(net, OPTIMIZERS["AdamW fused"])
    second = flat_optimizer(net, OPTIMIZERS["AdamW fused"])
    for step in range(3):
        gradients(net, step)
        flat_of(first).grad = flat_gradient(net)
        first.step()
    with torch.no_grad():
        flat_of(second).copy_(flat_of(first))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        for step in (3, 4):
            gradients(net, step)
            flat_of(optimizer).grad = flat_gradient(net)
            optimizer.step()
    assert torch.equal(flat_of(first), flat_of(second))
    assert float(second.state[flat_of(second)]["step"]) == 5


def test_the_sharder_sees_one_group_and_no_scheduler_can_flatten_the_rates() -> None:
    net = model()
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, OPTIMIZERS["AdamW"], emission="segmented")
    assert len(optimizer.param_groups) == 1
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * 0.25  # what any scheduler can do to it
    live = dl.optim.read_back(net, optimizer)
    assert {n: p.lr for n, p in live.items()} == pytest.approx(
        {n: 0.25 * e.lr for n, e in plan.entries.items()}
    )


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
    """Whole tensors and slices of a flat one; storages of all living tensors are counted."""

    def elements() -> int:
        gc.collect()
        return living_bytes()

    with only_new_tensors():
        measure_segments(elements)


def measure_segments(elements: Callable[[], int]) -> None:
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
    del optimizer
    before, weights = elements(), sum((p.numel() + GAP) * 4 for p in net.parameters())
    sliced = flat_optimizer(net, OPTIMIZERS["AdamW fused"])
    flat_of(sliced).grad = flat_gradient(net)
    sliced.step()
    assert elements() - before <= (2 + 2) * weights + 64 * names  # weight, gradient, two moments


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
    dl.proof.reapply(plan, net, second, factor=0.5)
    dl.verify(plan, net, second, factor=0.5)
    gradients(net, 0)
    with dl.effect_check(plan, net, second, factor=0.5) as observed:
        second.step()
    assert observed["blocks.0.attn.to_q.weight"] == pytest.approx(0.5 * 4e-3, rel=0.02)


def test_state_that_somebody_replaced_by_a_plain_dict_is_stepped_on() -> None:
    net = torch.nn.Linear(3, 3)
    plan = dl.plan_model(net, {"learning_rate": 1e-3})
    optimizer = dl.attach(plan, net, torch.optim.AdamW, emission="segmented")
    for _ in range(2):
        net(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.state = dict(optimizer.state)  # type: ignore[assignment]
        optimizer.state.clear()
