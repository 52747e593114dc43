"""Optimizers of other libraries: which work with per-layer rates, and what the others are told.

bitsandbytes and torchao are not in the `dev` extra: once installed, PEFT imports them in every
process, which costs 1.5 s and warnings. Their tests run where somebody has installed them, and say
so where not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lion_pytorch
import prodigyopt
import pytest
import torch
from torch import nn

import dist_layerlr as dl
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.sharders.base import Slice

WIDTH = 64
"""Weights of 4,096 elements: the fewest for which both libraries quantise the state."""
CONFIG = {
    "learning_rate": 3e-4,
    "per_layer_lr": {
        "enabled": True,
        "unmatched": "default",
        "component_lr": {"self_attn": 4e-3, "ffn": 1e-3},
    },
}
Make = Callable[[Any], torch.optim.Optimizer]


def optional(package: str, kind: str) -> Make:
    """An optimizer of a package that may be absent."""

    def make(groups: Any) -> torch.optim.Optimizer:
        why = f"{package} is not installed: pip install {package}"
        return getattr(pytest.importorskip(f"{package}.optim", reason=why), kind)(groups)  # type: ignore[no-any-return]

    return make


WORKS: dict[str, Make] = {
    **{
        f"bitsandbytes {k}": optional("bitsandbytes", k)
        for k in ("AdamW8bit", "AdamW32bit", "Lion8bit")
    },
    **{f"torchao {k}": optional("torchao", k) for k in ("AdamW8bit", "AdamW4bit", "AdamWFp8")},
    "lion-pytorch Lion": lambda g: lion_pytorch.Lion(g, weight_decay=0.1),
}
QUANTISED = [
    name for name in WORKS if not ("32bit" in name or "Lion" in name and "8bit" not in name)
]


@pytest.fixture(autouse=True)
def without_a_compiler() -> Iterator[None]:
    """torchao compiles its step, which needs a C++ compiler; the same code runs without."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def model() -> nn.Module:
    torch.manual_seed(0)
    block = {
        "attn": nn.ModuleDict({"to_q": nn.Linear(WIDTH, WIDTH)}),
        "mlp": nn.Linear(WIDTH, WIDTH),
    }
    return nn.ModuleDict(
        {"blocks": nn.Sequential(nn.ModuleDict(block)), "head": nn.Linear(WIDTH, 4)}
    )


def train(net: nn.Module, make: Make, emission: str) -> dict[str, torch.Tensor]:
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, make, emission=emission)
    schedule = dl.PlanSchedule(optimizer, dl.Schedule(kind="cosine", warmup_steps=1, total_steps=5))
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        dl.verify(plan, net, optimizer, factor=schedule.factor)
    if any(make is WORKS[name] for name in QUANTISED):
        state = optimizer.state[net.get_parameter("blocks.0.mlp.weight")]
        assert any(
            "OptimState" in type(s).__name__ or getattr(s, "dtype", None) == torch.uint8
            for s in state.values()
        )
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", WORKS)
def test_it_trains_at_the_planned_rates_in_groups_and_segmented_alike(name: str) -> None:
    groups, segmented = (
        train(model(), WORKS[name], "groups"),
        train(model(), WORKS[name], "segmented"),
    )
    assert all(torch.equal(groups[n], segmented[n]) for n in groups)
    start = dict(model().named_parameters())
    moved = {n: float((groups[n] - start[n]).abs().median()) for n in groups}
    assert moved["blocks.0.attn.to_q.weight"] / moved["blocks.0.mlp.weight"] == pytest.approx(
        4, rel=0.2
    )


def flat(make: Make) -> Segmented:
    net = model()
    parts = dict(net.named_parameters())
    owner = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parts.values()]))
    slices, offset = [], 0
    for name, param in parts.items():
        slices.append(Slice(name=name, start=0, owner=owner, offset=offset, numel=param.numel()))
        offset += param.numel()
    owner.grad = torch.ones_like(owner)
    return Segmented(dl.plan_model(net, CONFIG), [owner], make, slices)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_state_is_refused_where_names_share_a_flat_tensor(name: str) -> None:
    with pytest.raises(dl.ConfigError, match="1-D shard: it ends .* of its move away.*or DDP"):
        dl.optim.check_optimizer(flat(WORKS[name]))


def test_lion_steps_slices_of_a_flat_tensor() -> None:
    optimizer = flat(WORKS["lion-pytorch Lion"])
    dl.optim.check_optimizer(optimizer)
    optimizer.step()
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].ndim == 1


def test_an_unknown_optimizer_whose_state_is_no_elementwise_one_is_stopped_at_its_first_step() -> (
    None
):
    class Rows(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for state in self.state.values():
                state["rows"] = torch.zeros(3)

    with pytest.raises(dl.ConfigError, match=r"state 'rows' \(3,\).*Use AdamW"):
        flat(Rows).step()


def test_prodigy_is_refused_because_it_finds_one_rate_for_all() -> None:
    for emission in ("groups", "segmented"):
        with pytest.raises(
            dl.ConfigError, match="Prodigy .*at one learning rate; at two it raised .*It adapts one"
        ):
            train(model(), prodigyopt.Prodigy, emission)


@pytest.mark.parametrize("name", ["torchao AdamW8bit", "torchao AdamWFp8"])
def test_quantised_state_is_not_saved_by_name(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    plan = dl.plan_model(net, CONFIG)
    optimizer = dl.attach(plan, net, WORKS[name])
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(
        dl.errors.CheckpointError, match="Cannot save 'exp_avg' of .*keeps state that is quantised"
    ):
        dl.save_checkpoint(tmp_path / "root", plan, net, optimizer, step=1)
    assert not (tmp_path / "root").exists()
