"""Checkpoints of one process: memory layouts, ties, buffers, precisions, another plan, what is
frozen or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr import Plan, attach, load_checkpoint, plan_model, save_checkpoint
from dist_layerlr.checkpoint import folders
from dist_layerlr.errors import CheckpointError, ConfigError, PlanMismatch
from tests.support.ranks import run_ranks


@dataclass
class Layout:
    plan: Plan
    model: nn.Module
    optimizer: torch.optim.Optimizer


def unsharded(model: nn.Module, rates: dict[str, Any], kind: Any = torch.optim.AdamW) -> Layout:
    plan = plan_model(
        model,
        {"per_layer_lr": {"enabled": True, "unmatched": "default", "component_lr": {}, **rates}},
    )
    return Layout(plan, model, attach(plan, model, lambda groups: kind(groups, lr=1.0)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.tied = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.first(x)) + self.tied(x)


def precisions(root: Path, net: Callable[[], Convolutions]) -> None:
    """A frozen base is the same in any precision."""

    def frozen(dtype: torch.dtype, scale: float = 1.0) -> Layout:
        model = net()
        model.tied.requires_grad_(False).to(dtype)  # and first.weight, which is tied to it
        with torch.no_grad():
            model.tied.weight.mul_(scale)
        return unsharded(model, {"default_lr": 1e-3})

    for saved, live in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        one, two, other = frozen(saved), frozen(live), frozen(live, 1.5)
        path = save_checkpoint(
            root / str(saved), one.plan, one.model, one.optimizer, step=0, frozen=False
        ).path
        load_checkpoint(path, two.plan, two.model, two.optimizer)
        with pytest.raises(CheckpointError, match="another base model"):
            load_checkpoint(path, other.plan, other.model, other.optimizer)


def state_in_the_live_precision(root: Path) -> None:
    """Moments that had their weight's dtype get the live weight's: torch steps no other."""

    def layout(dtype: torch.dtype) -> Layout:
        torch.manual_seed(0)
        return unsharded(nn.Sequential(nn.Linear(4, 4).to(dtype)), {"default_lr": 1e-3})

    def step(layout: Layout, dtype: torch.dtype) -> None:
        layout.model(torch.ones(2, 4, dtype=dtype)).square().mean().backward()
        layout.optimizer.step()

    for saved, live in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        one, two = layout(saved), layout(live)
        step(one, saved)
        path = save_checkpoint(root / str(saved), one.plan, one.model, one.optimizer, step=1).path
        load_checkpoint(path, two.plan, two.model, two.optimizer)
        step(two, live)
        moments = [state["exp_avg"] for state in two.optimizer.state.values()]
        assert {moment.dtype for moment in moments} == {live}
        step(one, saved)
        for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
            torch.testing.assert_close(a.float(), b.float(), atol=1e-2, rtol=0.0)


def refusals(root: Path, net: Callable[[], Convolutions]) -> None:
    layout = unsharded(net(), {"default_lr": 1e-3})

    def save(name: str, **fields: Any) -> Path:
        given = {"step": 0, "optimizer": layout.optimizer, **fields}
        return save_checkpoint(root / name, layout.plan, layout.model, **given).path

    path = save("good")
    untied = net()
    untied.tied.weight = nn.Parameter(untied.tied.weight.detach().clone())
    other = unsharded(untied, {"default_lr": 1e-3})
    with pytest.raises(
        CheckpointError,
        match=r"first\.weight and tied\.weight are one tied tensor in it, and two in",
    ):
        load_checkpoint(path, other.plan, other.model, other.optimizer)
    layout.model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    layout.optimizer.step()
    amsgrad = unsharded(
        net(),
        {"default_lr": 1e-3},
        lambda groups, lr: torch.optim.AdamW(groups, lr=lr, amsgrad=True),
    )
    with pytest.raises(
        CheckpointError, match=r"has amsgrad=True, but .* no max_exp_avg_sq of .* Set amsgrad=False"
    ):
        load_checkpoint(save("good", step=1), amsgrad.plan, amsgrad.model, amsgrad.optimizer)
    for fields, told in (
        ({"step": -1}, "Invalid step=-1: must be an integer >= 0"),
        ({"step": 1.5}, r"Invalid step=1\.5"),
        ({"keep": 0}, "Invalid keep=0: must be an integer >= 1"),
        ({"optimizer": None}, "Invalid optimizer=None: give the torch optimizer that is stepped"),
    ):
        with pytest.raises(ConfigError, match=told):
            save("bad", **fields)
    layout.optimizer.param_groups[0]["lr"] = (
        5e-3  # not what the plan says: a load would silently go back to that
    )
    layout.optimizer.param_groups[0]["initial_lr"] = 5e-3
    with pytest.raises(PlanMismatch, match=r"planned lr 0\.001, live 0\.005"):
        save("bad")
    assert not (root / "bad").exists()


def net(scale: float = 1.0) -> Convolutions:
    torch.manual_seed(3)
    model: Any = Convolutions().to(memory_format=torch.channels_last)
    with torch.no_grad():
        model.first.weight.mul_(scale)
    return model


def step(layout: Layout) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    layout.model(x).square().mean().backward()
    layout.optimizer.step()
    layout.optimizer.zero_grad()


def assert_same(one: Layout, other: Layout) -> None:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def another_plan(root: Path, one: Layout) -> None:
    """channels_last, batch norm, ties; another plan; a new scheduler base."""
    step(one)
    scheduler = torch.optim.lr_scheduler.StepLR(one.optimizer, 5)
    extra = {"scheduler": scheduler, "note": "hi"}
    save_checkpoint(root, one.plan, one.model, one.optimizer, step=1, extra=extra)
    two = unsharded(net(2.0), {"default_lr": 2e-3})
    again = torch.optim.lr_scheduler.StepLR(two.optimizer, 5)
    restored = load_checkpoint(root, two.plan, two.model, two.optimizer, extra={"scheduler": again})
    assert restored.extra["note"] == "hi" and "lr 0.001 -> 0.002" in restored.changes[0]
    assert again.base_lrs == [2e-3] and {g["lr"] for g in two.optimizer.param_groups} == {2e-3}
    assert_same(one, two)
    moment = two.optimizer.state[two.model.first.weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moment, one.optimizer.state[one.model.first.weight]["exp_avg"])
    kept = unsharded(net(), {"default_lr": 2e-3, "resume_lr": "checkpoint"})
    restored = load_checkpoint(root, kept.plan, kept.model, kept.optimizer)
    assert {g["lr"] for g in kept.optimizer.param_groups} == {1e-3}
    assert restored.plan.digest == one.plan.digest
    step(kept), step(one)
    assert_same(one, kept)


def frozen_and_freed(root: Path) -> None:
    """Weights frozen and freed in between start with fresh moments."""
    part = net()
    part.norm.requires_grad_(False)
    frozen = unsharded(part, {"default_lr": 1e-3})
    load_checkpoint(root, frozen.plan, frozen.model, frozen.optimizer)
    step(frozen)
    save_checkpoint(root / "frozen", frozen.plan, frozen.model, frozen.optimizer, step=2)
    freed = unsharded(net(), {"default_lr": 1e-3})
    restored = load_checkpoint(root / "frozen", freed.plan, freed.model, freed.optimizer)
    assert set(restored.fresh) == {"norm.weight", "norm.bias"}
    step(freed)


def state_that_is_refused_or_absent(root: Path, one: Layout) -> None:
    adafactor = unsharded(net(), {"default_lr": 1e-3}, torch.optim.Adafactor)
    step(adafactor)
    wanted = "Adafactor keeps state that is quantised or not element"
    with pytest.raises(CheckpointError, match=wanted):
        save_checkpoint(root, adafactor.plan, adafactor.model, adafactor.optimizer, step=2)
    early = unsharded(net(), {"default_lr": 1e-3})
    start = save_checkpoint(root / "start", early.plan, early.model, early.optimizer, step=0)
    load_checkpoint(start.path, one.plan, one.model, one.optimizer)
    assert not any(one.optimizer.state.values())


def one_process(rank: int, world_size: int, root: Path) -> None:
    one = unsharded(net(), {"default_lr": 1e-3})
    another_plan(root, one)
    precisions(root / "precisions", net)
    state_in_the_live_precision(root / "state")
    refusals(root / "refusals", net)
    frozen_and_freed(root)
    state_that_is_refused_or_absent(root, one)
    shutil.rmtree(root)
    assert not folders.complete_checkpoints(root)


def test_one_process_keeps_layouts_ties_buffers_schedulers_and_what_is_frozen(
    tmp_path: Path,
) -> None:
    run_ranks(one_process, 1, tmp_path / "x")
