"""What the caller keeps along with a checkpoint, schedulers above all, comes back as it was; 0-d
parameters, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

from dist_layerlr import (
    ConfigError,
    PlanSchedule,
    Schedule,
    attach,
    load_checkpoint,
    plan_model,
    save_checkpoint,
)
from dist_layerlr.errors import CheckpointError
from tests.support.ranks import run_ranks

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "nested": lambda o: lr.SequentialLR(o, [lr.LambdaLR(o, _rise), lr.LambdaLR(o, _fall)], [2]),
    "chained": lambda o: lr.ChainedScheduler(
        [lr.LambdaLR(o, _fall), lr.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "milestones": lambda o: lr.MultiStepLR(o, [2, 5], 0.1),
}


def _rise(step: int) -> float:
    return (step + 1) / 4


def _fall(step: int) -> float:
    return 1 / (step + 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(4, 4), "ffn": nn.Linear(4, 4)}) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["ffn"](block["attn"](x))  # type: ignore[index]
        return x * self.scale


class Run:
    def __init__(self, make: Make | None = None, attn: float = 2e-3) -> None:
        torch.manual_seed(0)
        self.model = Net()
        rates = {
            "enabled": True,
            "component_lr": {"self_attn": attn, "ffn": 1e-3},
            "depth_strategy": "linear",
        }
        self.plan = plan_model(self.model, {"learning_rate": 1e-3, "per_layer_lr": rates})
        self.optimizer = attach(
            self.plan, self.model, lambda groups: torch.optim.AdamW(groups, lr=1.0)
        )
        self.scheduler = make(self.optimizer) if make else None

    def train(self, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            generator = torch.Generator().manual_seed(step)
            self.model(torch.randn(2, 4, generator=generator)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler is not None:
                self.scheduler.step()

    def save(self, root: Path, step: int, **extra: Any) -> Path:
        return save_checkpoint(
            root, self.plan, self.model, self.optimizer, step=step, extra=extra
        ).path

    def rates(self) -> dict[str, float]:
        groups = {
            id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]
        }
        return {name: groups[id(p)] for name, p in self.model.named_parameters()}


def schedulers_go_on(root: Path) -> None:
    """A changed plan reorders the groups; a scheduler keeps its rates by position."""
    for name, make in SCHEDULERS.items():
        for attn in (2e-3, 5e-4):
            half, back, whole = Run(make), Run(make, attn), Run(make, attn)
            half.train(0, 3)
            path = half.save(root / f"{name}{attn}", 3, scheduler=half.scheduler)
            restored = load_checkpoint(
                path, back.plan, back.model, back.optimizer, extra={"scheduler": back.scheduler}
            )
            assert restored.fresh == []  # the 0-d parameter's moments are state as any other's
            assert back.scheduler.get_last_lr() == [
                group["lr"] for group in back.optimizer.param_groups
            ]
            back.train(3, 4)
            whole.train(0, 7)
            assert back.rates() == pytest.approx(whole.rates(), rel=1e-12), (name, attn)


def rates_that_are_no_multiple_of_the_plan_are_refused(root: Path) -> None:
    run = Run(lambda o: lr.CosineAnnealingLR(o, 10, eta_min=1e-4))
    with pytest.raises(ConfigError, match=r"Invalid scheduler CosineAnnealingLR\(eta_min=0.0001\)"):
        run.save(root, 0, scheduler=run.scheduler)


def values_are_those_of_the_moment_of_the_call(root: Path) -> None:
    run = Run()
    losses = [1.0]
    extra = {"losses": losses, "seen": {3: {"a": 1}, 10: None}}
    saving = save_checkpoint(
        root, run.plan, run.model, run.optimizer, step=0, extra=extra, background=True
    )
    losses.append(2.0)
    saving.wait()
    back = load_checkpoint(root, run.plan, run.model, run.optimizer).extra
    assert back == {"losses": [1.0], "seen": {3: {"a": 1}, 10: None}}


def a_schedule_of_another_length_goes_on_at_its_own_multiplier(root: Path) -> None:
    short, long = Schedule(kind="linear", total_steps=11), Schedule(kind="linear", total_steps=21)
    run = Run(lambda o: PlanSchedule(o, short))
    run.train(0, 5)
    path = run.save(root, 5, schedule=run.scheduler)
    back = Run(lambda o: PlanSchedule(o, long))
    load_checkpoint(path, back.plan, back.model, back.optimizer, extra={"schedule": back.scheduler})
    assert back.rates()["blocks.0.attn.weight"] == pytest.approx(2e-3 * (1 - 5 / 20))
    with pytest.warns(UserWarning, match=r"extra\['schedule'\] was not asked for: it starts anew"):
        load_checkpoint(path, back.plan, back.model, back.optimizer)


def what_was_not_saved_is_not_silently_left_at_its_start(root: Path) -> None:
    run = Run(SCHEDULERS["milestones"])
    path = run.save(root, 0, seen=3)
    with pytest.raises(
        CheckpointError, match=r"extra\['scheduler'\] is not in checkpoint .* which has \['seen'\]"
    ):
        load_checkpoint(
            path, run.plan, run.model, run.optimizer, extra={"scheduler": run.scheduler}
        )


def a_grad_scaler_goes_on(root: Path) -> None:
    """Its scale has halved after an overflow; a new one would start at the first scale."""

    def train(run: Run, scaler: torch.amp.GradScaler, first: int, steps: int) -> None:
        for step in range(first, first + steps):
            loss = run.model(torch.full((2, 4), 1.0 + step)).square().mean()
            scaler.scale(loss * (1e38 if step == 1 else 1.0)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=1024.0)

    whole, half, back = Run(), Run(), Run()
    straight, first, second = scaler(), scaler(), scaler()
    train(whole, straight, 0, 8)
    train(half, first, 0, 3)
    path = half.save(root, 3, scaler=first)
    load_checkpoint(path, back.plan, back.model, back.optimizer, extra={"scaler": second})
    train(back, second, 3, 5)
    assert straight.state_dict() == second.state_dict() and second.get_scale() == 512.0
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), back.model.parameters(), strict=True)
    )


def a_scheduler_prepared_by_accelerate_goes_on(root: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared(optimizer: torch.optim.Optimizer) -> Any:
        return accelerator.prepare_scheduler(lr.MultiStepLR(optimizer, [2], 0.1))

    run, back = Run(prepared), Run(prepared, 5e-4)
    path = run.save(root / "good", 0, scheduler=run.scheduler)
    load_checkpoint(
        path, back.plan, back.model, back.optimizer, extra={"scheduler": back.scheduler}
    )
    assert back.scheduler.scheduler.base_lrs == [
        group["initial_lr"] for group in back.optimizer.param_groups
    ]
    bad = Run(lambda o: accelerator.prepare_scheduler(lr.CosineAnnealingLR(o, 10, eta_min=1e-4)))
    with pytest.raises(ConfigError, match=r"Invalid scheduler CosineAnnealingLR\(eta_min=0.0001\)"):
        bad.save(root / "bad", 0, scheduler=bad.scheduler)


def on_rank(rank: int, world_size: int, root: Path) -> None:
    for case in (
        schedulers_go_on,
        rates_that_are_no_multiple_of_the_plan_are_refused,
        values_are_those_of_the_moment_of_the_call,
        a_schedule_of_another_length_goes_on_at_its_own_multiplier,
        what_was_not_saved_is_not_silently_left_at_its_start,
        a_grad_scaler_goes_on,
        a_scheduler_prepared_by_accelerate_goes_on,
    ):
        case(root / case.__name__)


def test_schedulers_and_other_extras_come_back_as_they_were(tmp_path: Path) -> None:
    run_ranks(on_rank, 1, tmp_path)
