"""Rates that change between two steps are those of a loop that sets them by hand, under every
sharder, with all state where it was."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr import PlanMismatch, PlanSchedule, Schedule, attach, plan_model
from dist_layerlr.errors import ConfigError
from dist_layerlr.optim import read_back
from dist_layerlr.plan import Plan, steered
from dist_layerlr.proof import steer
from tests.support.cases import At, Outcomes, items_of, run_bodies
from tests.support.drivers import start_deepspeed
from tests.support.naive_deepspeed import ds_config, silence, start
from tests.support.several import (
    BAR,
    BATCH,
    CONFIG,
    LAYOUTS,
    MAKES,
    NET,
    Case,
    Run,
    Weights,
    adamw,
    distance,
    net,
    reference,
)

FIRST, SECOND, STEPS = 2, 4, 6
"""Steps done when something changes, and at the end."""
AT_FIRST: dict[str, Any] = {
    # The plan gives attention and the rest one rate: their groups have to part.
    "scale": [{"component": "self_attn", "by": 0.25}, {"match": "blocks.1", "by": 2.0}],
    "freeze": [{"match": "head"}, {"component": "ffn", "match": "blocks.[45]"}],
}
AT_SECOND: dict[str, Any] = {
    "thaw": [{"match": "blocks.5"}],
    "scale": [{"component": "self_attn", "by": 0.5}],
}


def times(name: str, step: int) -> float:
    """What the changes make of a rate, by hand."""
    if step < FIRST:
        return 1.0
    attention, block = ".attn." in name, f"{name}.".split(".")[1]
    factor = (0.25 if attention else 1.0) * (2.0 if block == "1" else 1.0)
    if step >= SECOND and attention:
        factor *= 0.5
    held = name.startswith("head.") or (".mlp." in name and block == "4")
    held |= ".mlp." in name and block == "5" and step < SECOND
    return 0.0 if held else factor


ONE = replace(
    NET,
    config={key: value for key, value in CONFIG.items() if key != "optimizers"},
    is_muon=lambda name, param: False,
)
CASES: dict[str, tuple[Case, Any]] = {"adamw": (ONE, adamw), "several": (NET, MAKES)}
CELLS = [f"{case}: {layout}" for case in CASES for layout in LAYOUTS]


@functools.cache
def by_hand(case: str) -> Weights:
    return reference(CASES[case][0], STEPS, times)


def ends_as_by_hand(cell: str, at: At) -> tuple[float, float]:
    """How far a run ends from the loop, and how far the loop ends from one without changes."""
    name, _, layout = cell.partition(": ")
    case, make = CASES[name]
    with silence():
        run = Run(case, layout, make)
        run.train(FIRST)
        plan = steer(run.plan, run.model, run.optimizer, changes=AT_FIRST)
        run.train(SECOND - FIRST, first=FIRST)
        plan = steer(plan, run.model, run.optimizer, changes=AT_SECOND)
        run.train(STEPS - SECOND, first=SECOND)
    assert plan.digest == steered(run.plan, AT_FIRST, AT_SECOND).digest != run.plan.digest
    live = read_back(run.model, run.optimizer)
    assert {entry.lr for entry in plan.entries.values()} == {p.lr for p in live.values()}
    return distance(run.weights(), by_hand(name)), distance(by_hand(name), unsteered(name))


@functools.cache
def unsteered(case: str) -> Weights:
    return reference(CASES[case][0], STEPS)


def ranks_that_are_told_otherwise_change_nothing(at: At) -> str:
    run = Run(ONE, "fsdp2", adamw)
    before = {name: p.lr for name, p in read_back(run.model, run.optimizer).items()}
    changes = {"scale": [{"component": "ffn", "by": 0.5 if at.rank else 0.25}]}
    with pytest.raises(PlanMismatch) as caught:
        steer(run.plan, run.model, run.optimizer, changes=changes)
    with pytest.raises(ConfigError, match="by=0.0: must be a finite number > 0"):
        # On one rank only: the other must not wait for it.
        steer(
            run.plan,
            run.model,
            run.optimizer,
            changes={"scale": [{"component": "ffn", "by": 1.0 - at.rank}]},
        )
    assert before == {name: p.lr for name, p in read_back(run.model, run.optimizer).items()}
    return str(caught.value)


def groups_that_an_engine_has_flattened_are_refused(at: At) -> str:
    model = net()
    plan = plan_model(model, ONE.config)
    settings = ds_config(1)
    settings["train_micro_batch_size_per_gpu"] = BATCH // 2
    with silence():
        engine = start(model, attach(plan, model, adamw, emission="groups"), settings)
    before = {name: p.lr for name, p in read_back(engine).items()}
    with pytest.raises(PlanMismatch) as caught:
        steer(plan, engine, changes=AT_FIRST)
    assert before == {name: p.lr for name, p in read_back(engine).items()}
    # A change that parts no group is taken.
    whole = [{"component": "ffn", "by": 0.5}]
    plan = steer(plan, engine, changes={"scale": whole})
    assert read_back(engine)["blocks.0.mlp.0.weight"].lr == pytest.approx(1e-3)
    return str(caught.value)


OTHERS = {
    "flattened": groups_that_an_engine_has_flattened_are_refused,
    "told otherwise": ranks_that_are_told_otherwise_change_nothing,
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    chosen = {
        item.callspec.params.get("cell") for item in items_of(request) if hasattr(item, "callspec")
    }
    bodies = {cell: functools.partial(ends_as_by_hand, cell) for cell in CELLS if cell in chosen}
    yield run_bodies({**bodies, **OTHERS}, 2, start_deepspeed)


@pytest.mark.parametrize("cell", CELLS)
def test_steered_weights_are_those_of_a_loop_that_sets_the_rates(
    cell: str, outcomes: Outcomes
) -> None:
    for far, moved in outcomes.settle(cell):
        assert far < BAR < 100 * BAR < moved


def test_ranks_that_are_told_other_changes_refuse_all_of_them(outcomes: Outcomes) -> None:
    for text in outcomes.settle("told otherwise"):
        assert "plans differ between ranks" in text


def test_groups_that_cannot_part_are_refused_and_stay(outcomes: Outcomes) -> None:
    for text in outcomes.settle("flattened"):
        assert "in one piece" in text and "emission='segmented'" in text


def toy() -> tuple[Plan, nn.Module, torch.optim.Optimizer]:
    model = net()
    plan = plan_model(model, ONE.config)
    return plan, model, attach(plan, model, adamw)


def test_a_schedule_goes_on_with_the_steered_rates() -> None:
    plan, model, optimizer = toy()
    schedule = PlanSchedule(optimizer, Schedule(kind="linear", total_steps=5))
    schedule.step()
    plan = steer(plan, model, optimizer, changes={"scale": [{"match": "emb", "by": 0.5}]})
    schedule.step()
    live = read_back(model, optimizer)
    assert live["emb.weight"].lr == pytest.approx(0.5 * 1e-3 * 0.5)
    assert live["head.weight"].lr == pytest.approx(1e-3 * 0.5)
    # Frozen now: two rates of 0 must not be taken for one group of another rate.
    freeze = {"freeze": [{"match": "emb"}, {"component": "ffn"}]}
    plan = steer(plan, model, optimizer, changes=freeze)
    schedule.step()
    live = read_back(model, optimizer)
    assert (live["emb.weight"].lr, live["blocks.0.mlp.0.weight"].lr) == (0.0, 0.0)
    assert live["head.weight"].lr == pytest.approx(1e-3 * 0.25)


def test_rates_that_are_tensors_stay_each_groups_own() -> None:
    model = net()
    plan = plan_model(model, ONE.config)

    def make(groups: Any) -> torch.optim.Optimizer:
        held = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]
        return torch.optim.AdamW(held, lr=torch.tensor(1.0), foreach=False)

    optimizer = attach(plan, model, make)
    steer(plan, model, optimizer, changes={"scale": [{"match": "emb", "by": 0.5}]})
    live = read_back(model, optimizer)
    assert (live["emb.bias"].lr, live["head.bias"].lr) == pytest.approx((5e-4, 1e-3))


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as optimizers that adapt their rate do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_what_an_optimizer_keeps_in_its_groups_goes_on(emission: str) -> None:
    model = net()
    plan = plan_model(model, ONE.config)
    optimizer: Any = attach(plan, model, Counting, emission=emission)
    for step in range(2):
        ONE.loss(model, step, slice(0, 4)).backward()
        optimizer.step()
    steer(plan, model, optimizer, changes={"scale": [{"component": "self_attn", "by": 0.5}]})
    stepped = getattr(optimizer, "inner", optimizer)
    assert len(stepped.param_groups) == 3
    assert [group["count"] for group in stepped.param_groups] == [2, 2, 2]
