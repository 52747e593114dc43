"""What `check_scheduler` says, how far it looks, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import DummyScheduler
from torch import nn
from torch.optim import lr_scheduler as lr
from transformers import optimization as hf

from dist_layerlr import attach, plan_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim import check_scheduler, param_groups
from dist_layerlr.optim.rehearsal import Copier
from tests.support.naive import CONFIG, make_model


def two_groups(rates: tuple[float, float] = (5e-4, 1e-4)) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": rate, "initial_lr": rate, "name": name}
        for name, rate in zip(("attn", "ffn"), rates, strict=True)
    ]
    return torch.optim.AdamW(groups, lr=max(rates))


def message(scheduler: Any, **how: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_scheduler(scheduler, **how)
    return str(caught.value)


def test_it_names_scheduler_step_both_groups_both_rates_and_what_to_do():
    text = message(lr.CosineAnnealingLR(two_groups(), 50, eta_min=1e-5))
    assert text.startswith(
        "Invalid scheduler CosineAnnealingLR(eta_min=1e-05): at step 1 it does not keep the planned"
        " ratios: group 'attn' is planned at 0.0005 and would train at 0.000499517 (x 0.999033),"
        " group 'ffn' is planned at 0.0001 and would train at 9.99112e-05 (x 0.999112). Use"
        " PlanSchedule(optimizer, Schedule(...)), or follow(optimizer, make_scheduler)"
    )


def test_the_step_is_the_first_that_differs():
    late = [lambda step: 1.0, lambda step: 1.0 if step < 700 else 0.5]
    assert "at step 700 it" in message(lr.LambdaLR(two_groups(), late))
    # Nothing in these settings tells that the run has more than 100 steps.
    limit = 699.5
    late = [lambda step: 1.0, lambda step: 1.0 if step < limit else 0.5]
    check_scheduler(lr.LambdaLR(two_groups(), late))
    assert "at step 700 it" in message(lr.LambdaLR(two_groups(), late), steps=800)


def test_the_part_of_a_sequence_that_is_wrong_is_named():
    optimizer = two_groups()
    parts = [lr.LinearLR(optimizer), lr.CosineAnnealingLR(optimizer, 50, eta_min=1e-5)]
    text = message(lr.SequentialLR(optimizer, parts, [5]))
    assert "SequentialLR (its CosineAnnealingLR(eta_min=1e-05)): at step 6 it" in text


def test_what_a_scheduler_does_behind_its_own_end_is_no_fault():
    check_scheduler(lr.LambdaLR(two_groups(), lambda step: 1 - step / 30))
    check_scheduler(
        lr.OneCycleLR(two_groups(), [5e-4, 1e-4], 30, cycle_momentum=False, div_factor=1.0)
    )
    text = message(lr.LambdaLR(two_groups(), lambda step: 1 - step / 30), steps=40)
    assert "at step 31 it leaves [0, 1]" in text
    once = lr.OneCycleLR(two_groups(), [5e-4, 1e-4], 30, cycle_momentum=False, div_factor=1.0)
    assert "at step 31 it cannot go on (ValueError: Tried to step 31" in message(once, steps=40)


def test_the_end_may_be_any_number_in_the_settings():
    seed, last = 500, 30
    check_scheduler(lr.LambdaLR(two_groups(), lambda step: 1 - step / last + 0 * seed))
    early = lr.LambdaLR(two_groups(), lambda step: 1.0 - step / 15.5 + 0 * seed)
    assert "at step 16 it leaves [0, 1]" in message(early)


def test_rates_that_no_float_can_hold_are_0():
    check_scheduler(lr.ExponentialLR(two_groups((7e-4, 1e-4)), 0.3), steps=800)


def test_one_that_moves_the_planned_rate_along_is_refused():
    class Moves:
        def __init__(self) -> None:
            self.optimizer = two_groups()

        def step(self) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] = group["initial_lr"] * 0.9

    assert "at step 1 it writes initial_lr=0.00045 into group 'attn'" in message(Moves())


def test_every_part_of_a_run_that_is_too_long_is_looked_at():
    optimizer = two_groups()
    parts = [lr.ConstantLR(optimizer, 1.0), lr.CosineAnnealingLR(optimizer, 50, eta_min=1e-5)]
    text = message(lr.SequentialLR(optimizer, parts, [900_000]))
    assert "CosineAnnealingLR(eta_min=1e-05)" in text


def test_a_rate_of_0_stays_0():
    frozen = two_groups((5e-4, 0.0))
    check_scheduler(lr.CosineAnnealingLR(frozen, 50))
    text = message(lr.CosineAnnealingLR(frozen, 50, eta_min=1e-6))
    assert "group 'ffn' is planned at 0 and would train at" in text


def test_a_rate_in_a_tensor_is_simulated_as_one():
    optimizer = two_groups()
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    check_scheduler(lr.CosineAnnealingLR(optimizer, 500))
    assert "does not keep" in message(lr.CosineAnnealingLR(optimizer, 500, eta_min=1e-5))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(5e-4)


def test_groups_that_were_written_over_before_the_check_are_told_by_the_plan():
    model = make_model()
    plan = plan_model(model, CONFIG)
    optimizer = attach(plan, model, torch.optim.AdamW, emission="groups")
    scheduler = lr.OneCycleLR(optimizer, 3e-4, 50, div_factor=1.0, cycle_momentum=False)
    assert "is planned at" in (text := message(scheduler)) and "its initial_lr is" in text


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_an_absolute_end_is_a_ratio_to_the_rate_of_the_plan(emission: str):
    """transformers divides it by the optimizer's default rate: attach states the plan's."""
    model = make_model()
    optimizer = attach(plan_model(model, CONFIG), model, torch.optim.AdamW, emission=emission)
    scheduler = hf.get_polynomial_decay_schedule_with_warmup(optimizer, 2, 20, lr_end=3e-5)
    check_scheduler(scheduler)
    for _ in range(25):
        optimizer.step()
        scheduler.step()
    group = optimizer.param_groups[0]
    assert group["lr"] / group["initial_lr"] == pytest.approx(3e-5 / 3e-4)


def test_an_absolute_end_against_a_rate_of_nobody_is_refused():
    model = make_model()
    groups = param_groups(plan_model(model, CONFIG), model)
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    scheduler = hf.get_polynomial_decay_schedule_with_warmup(optimizer, 2, 20, lr_end=3e-5)
    assert "it measures its end against lr_init=1, the optimizer's default" in message(scheduler)


def test_what_cannot_be_simulated_is_refused_with_the_reason():
    optimizer = two_groups()
    assert "it has no step()" in message(DummyScheduler(optimizer))

    class Slotted:
        __slots__ = ("optimizer",)

        def step(self) -> None: ...

    slotted = Slotted()
    slotted.optimizer = optimizer
    assert "it cannot be copied" in message(slotted)

    class Raises:
        def __init__(self) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            raise RuntimeError("no run")

    assert "at step 1 it cannot go on (RuntimeError: no run)" in message(Raises())

    class Blind:
        def step(self) -> None: ...

    assert "it shows no optimizer" in message(Blind())

    class Wants(Raises):
        def step(self, loss: float, norm: float) -> None: ...  # type: ignore[override]

    assert "its step() wants loss, norm" in message(Wants())


def test_one_that_reaches_the_live_optimizer_is_refused_and_undone():
    optimizer = two_groups()
    owner = nn.Module()
    object.__setattr__(owner, "held", optimizer)

    class Reaches:
        def __init__(self) -> None:
            self.optimizer, self.owner = optimizer, owner

        def step(self) -> None:
            self.owner.held.param_groups[0]["lr"] *= 0.5

    assert "writes to the live optimizer" in message(Reaches())
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 1e-4]


def test_a_model_behind_a_function_is_neither_copied_nor_touched():
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.big, self.calls = nn.Linear(64, 64), [0]

        def ramp(self, step: int) -> float:
            return 0.99**step

        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    trainer = Trainer()
    scheduler = lr.LambdaLR(two_groups(), trainer.ramp)
    check_scheduler(scheduler)
    assert scheduler.lr_lambdas[0].__self__ is trainer


def test_functions_see_the_copied_optimizer_and_count_in_copied_variables():
    optimizer = two_groups()
    calls = [0]

    def ramp(_: int) -> float:
        calls[0] += 1
        return 0.99 if optimizer.param_groups[0]["lr"] > 1e-4 else 1.0

    scheduler = lr.MultiplicativeLR(optimizer, ramp)
    before = calls[0]
    check_scheduler(scheduler)
    assert calls[0] == before


def test_a_function_that_calls_itself_can_be_copied():
    def ramp(step: int) -> float:
        return 1.0 if step < 1 else 0.99 * ramp(step - 1)

    check_scheduler(lr.LambdaLR(two_groups(), ramp), steps=50)
    copied = Copier().copy(ramp)
    assert copied is not ramp and copied(3) == ramp(3)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_steps_is_a_count(steps: Any):
    with pytest.raises(ConfigError, match="steps"):
        check_scheduler(lr.StepLR(two_groups(), 5), steps=steps)
