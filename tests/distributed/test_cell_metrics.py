"""Metrics per cell equal those of one unsharded process under every sharder, for one all-reduce.

The reference shares no code with the metrics: cells are written out by hand, norms are taken of
whole tensors in float64, before and after a step of torch alone.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dist_layerlr import CellMetrics, ConfigError, PlanSchedule, attach, plan_model
from dist_layerlr.optim.cells import CellReading, Reading
from dist_layerlr.ranks import RankFailure
from tests.distributed.parity.test_parity_native import LORA_SHARDERS
from tests.support.cases import Outcomes
from tests.support.drivers import SHARDERS, Native, Zero, start_deepspeed
from tests.support.parity import (
    Case,
    Measured,
    Recipe,
    batch,
    micro_batches,
    plain_name,
    run_cases,
)
from tests.support.ranks import run_ranks

STEPS, EVERY = 4, 2
CLOSE = 1e-5
QUANTITIES = ("lr", "grad_norm", "weight_norm", "update_norm")


class Foreign:
    """Steps parameter groups, but is no torch optimizer."""

    def __init__(self, groups: Any) -> None:
        self.param_groups = groups


Rows = dict[tuple[Any, ...], tuple[float, ...]]
SGD, CLIPPED = Recipe(optimizer="sgd"), Recipe(optimizer="sgd", clip=0.1)
SEGMENTED, GROUPED = (Recipe(optimizer="fused", emission=way) for way in ("segmented", "groups"))
LORA = Recipe(optimizer="sgd", lora=True)


def cell_of(name: str) -> tuple[str | None, int | None, str]:
    """(stack, block, component) of a name of the toy, by hand."""
    kinds = (("attn1", "self_attn"), ("ffn", "ffn"), ("norm", "norm"))
    kind = next((kind for part, kind in kinds if part in name), "default")
    block = re.search(r"blocks\.(\d)\.", name)
    # Outside blocks the toy's layers match no rule, or `last` the head's, which is not listed.
    return ("blocks", int(block[1]), kind) if block else (None, None, "outside")


class Collectives(TorchDispatchMode):
    """Counts the collectives inside it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


@functools.cache
def reference(recipe: Recipe) -> dict[int, Rows]:
    """{step: {cell: lr, norms of gradient, weight and update}} of one process."""
    model = recipe.model()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = []
    for name, param in trained.items():
        rate, decay = recipe.settings(name, param)
        groups.append({"params": [param], "weight_decay": decay, "rate": rate})
    optimizer, found = recipe.make(groups), {}
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * recipe.factor(step)
        x, y = batch(step)
        F.mse_loss(model(x), y).backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
        before = {n: p.detach().double().clone() for n, p in trained.items()}
        gradients = {n: p.grad.double().clone() for n, p in trained.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        cells: dict[Any, list[float]] = defaultdict(lambda: [0.0] * 5)
        for name, group in zip(trained, optimizer.param_groups, strict=True):
            row, old, size = cells[cell_of(plain_name(name))], before[name], before[name].numel()
            row[0] += size
            row[1] += group["lr"] * size
            row[2] += float(gradients[name].square().sum()) if name in gradients else 0.0
            row[3] += float(old.square().sum())
            row[4] += float((trained[name].detach().double() - old).square().sum())
        found[step] = {
            cell: (row[1] / row[0], *map(math.sqrt, row[2:])) for cell, row in cells.items()
        }
    return found


def joined(reading: Any) -> Rows:
    """A reading's rows, those outside blocks put together as the reference does."""
    found: Rows = {}
    for (stack, block, component), row in reading.cells.items():
        key = (stack, block, component) if stack else (None, None, "outside")
        values = tuple(getattr(row, name) for name in QUANTITIES)
        if key in found:
            # Both parts have one rate here.
            values = (values[0], *map(math.hypot, found[key][1:], values[1:]))
        found[key] = values
    return found


def run(make: Callable[[Recipe], Any], recipe: Recipe) -> Measured:
    """Train, and return the largest relative difference of any number in any measured step."""
    driver = make(recipe)
    cells = CellMetrics(driver.plan, driver.model, driver.optimizer, every=EVERY)
    live = driver.optimizer if driver.optimizer is not None else driver.model
    schedule = PlanSchedule(live, recipe.plan_schedule)
    worst, where, counts = 0.0, "", []
    for step in range(STEPS):
        with Collectives() as seen:
            for part, (x, y) in enumerate(micro_batches(step, recipe.accumulate), 1):
                with driver.micro_step(last=part == recipe.accumulate):
                    driver.backward(F.mse_loss(driver.model(x).float(), y))
            driver.step()
        schedule.step()
        with Collectives() as asked:
            reading = cells.read()
        counts.append((seen.count, asked.count))
        assert (reading is not None) == (step % EVERY == 0)
        if reading is None:
            continue
        mine, wanted = joined(reading), reference(recipe)[step]
        assert mine.keys() == wanted.keys()
        for cell, values in mine.items():
            for name, value, right in zip(QUANTITIES, values, wanted[cell], strict=True):
                off = abs(value - right) / (abs(right) or 1.0)
                if off > worst:
                    worst, where = off, f"{name} of {cell} in step {step}: {value}, not {right}"
    # A measured step talks no more than another one, and asking for it is one all-reduce.
    assert [asked for _, asked in counts] == [1, 0, 1, 0]
    assert counts[2][0] == counts[3][0]
    assert counts[3][0] > 0 or torch.distributed.get_world_size() == 1, "DDP's are seen"
    return Measured(worst, where, 0.0, CLOSE)


def native(wrap: Any, recipe: Recipe) -> Any:
    return Native(wrap, recipe)


def zero(stage: int, recipe: Recipe, **settings: Any) -> Any:
    return Zero(recipe, stage, **settings)


def case(name: str, make: Callable[[Recipe], Any], recipe: Recipe, ranks: int = 2) -> Case:
    return Case(name, ranks, functools.partial(run, make, recipe))


def of(name: str, **settings: Any) -> Callable[[Recipe], Any]:
    """How a model is put under a sharder."""
    if name.startswith("zero"):
        return functools.partial(zero, int(name[-1]), **settings)
    wraps = {"none": lambda model: model, **SHARDERS}
    return functools.partial(native, wraps[name])


NAMES = ("ddp", "fsdp1", "fsdp1_flat", "fsdp2", *(f"zero {stage}" for stage in range(4)))
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
CASES = [
    case("none", of("none"), SGD, ranks=1),
    *(case(name, of(name), SGD) for name in NAMES),
    *(case(f"{name}, clipped", of(name), CLIPPED) for name in NAMES),
    *(case(f"{name}, segmented AdamW", of(name), SEGMENTED) for name in NAMES),
    *(
        case(f"{name}, AdamW in groups", of(name), GROUPED)
        for name in ("ddp", "fsdp1", "fsdp2", "zero 0", "zero 1", "zero 2", "zero 3")
    ),
    *(
        case(f"{name}, LoRA", functools.partial(native, wrap), LORA)
        for name, wrap in LORA_SHARDERS.items()
    ),
    *(case(f"zero {stage}, LoRA", of(f"zero {stage}"), LORA) for stage in (2, 3)),
    case("fsdp2, 2 micro steps", of("fsdp2"), Recipe(optimizer="sgd", accumulate=2)),
    case("zero 3, small sub-groups", of("zero 3", zero={"sub_group_size": 500}), SEGMENTED),
    case("zero 2, optimizer offload", of("zero 2", **OFFLOAD), SEGMENTED),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[int, Outcomes]:
    return run_cases(CASES, request, start_deepspeed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_number_is_that_of_one_unsharded_process(
    case: Case, outcomes: dict[int, Outcomes]
) -> None:
    for outcome in outcomes[case.ranks].settle(case.id):
        assert outcome.worst <= outcome.bar, f"{case.id}: {outcome.worst:.1e}, {outcome.name}"


def test_an_overflow_moves_the_measurement_to_the_next_step_and_a_name_without_gradient_counts():
    recipe = Recipe(optimizer="sgd")
    model = recipe.model()
    plan = plan_model(model, recipe.config)
    optimizer = attach(plan, model, recipe.make)
    cells = CellMetrics(plan, model, optimizer, every=3)
    assert cells.read() is None, "nothing was stepped"
    model.blocks[0](torch.randn(2, 19)).square().mean().backward()
    optimizer.step()
    found = joined(cells.read())
    assert found["blocks", 0, "ffn"][1] > 0
    # Block 1 has no gradient: its weights are there, and stay.
    _, gradient, weight, update = found["blocks", 1, "ffn"]
    assert (gradient, update) == (0.0, 0.0) and weight > 1
    assert [cells.read() is None for _ in range(2)] == [True, True]
    cells.close()
    optimizer.step()
    assert cells.read() is None, "no longer watched"


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_gradients_that_come_with_a_closure_are_those_of_its_own_step(emission: str):
    recipe = Recipe(optimizer="sgd")
    model = recipe.model()
    plan = plan_model(model, recipe.config)
    optimizer = attach(plan, model, recipe.make, emission=emission)
    cells = CellMetrics(plan, model, optimizer, every=1)
    x, y = batch(0)
    for _ in range(2):
        wanted = 0.0

        def closure():
            nonlocal wanted
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
            wanted = float(sum(gradient.square().sum() for gradient in gradients))
            return loss

        assert float(optimizer.step(closure)) > 0
        found = cells.read()
        total = sum(cell.grad_norm**2 for cell in found.cells.values())
        assert total == pytest.approx(wanted, rel=CLOSE) and wanted > 0


def test_rows_and_curves_are_few_finite_and_named():
    ones = CellReading(lr=1e-4, grad_norm=2.0, weight_norm=4.0, update_norm=1.0)
    fresh = CellReading(lr=1e-4, grad_norm=math.nan, weight_norm=0.0, update_norm=1.0)
    cells = {("blocks", block, "ffn"): ones for block in range(60)}
    reading = Reading(cells={**cells, ("blocks", 60, "ffn"): fresh})
    rows, curves = reading.rows(), reading.curves()
    assert rows["blocks.007.ffn"] == [1e-4, 2.0, 4.0, 0.25]
    assert rows["blocks.060.ffn"] == [1e-4, None, 0.0, None]
    wanted = {f"{q}/ffn/{way}" for q in QUANTITIES[:3] for way in ("min", "median", "max")}
    assert {name for name in curves if not name.startswith("update")} == wanted
    assert curves["update_ratio/ffn/max"] == 0.25 and curves["weight_norm/ffn/min"] == 0.0


def test_what_cannot_be_watched_is_refused():
    recipe = Recipe()
    model = recipe.model()
    plan = plan_model(model, recipe.config)
    optimizer = attach(plan, model, recipe.make)
    with pytest.raises(ConfigError, match="Invalid every=0"):
        CellMetrics(plan, model, optimizer, every=0)
    with pytest.raises(ConfigError, match="Foreign: its steps cannot be watched"):
        CellMetrics(plan, model, Foreign(optimizer.param_groups))


def _one_rank_fails(rank: int, world_size: int) -> str:
    driver = Native(SHARDERS["ddp"], SGD)
    cells = CellMetrics(driver.plan, driver.model, driver.optimizer)
    if rank == 1:
        cells._list_pieces = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    x, y = batch(0)
    F.mse_loss(driver.model(x), y).backward()
    driver.step()
    with pytest.raises(RankFailure) as error:
        cells.read()
    return str(error.value)


def test_a_rank_that_cannot_measure_finishes_the_step_and_all_ranks_raise_its_error():
    said = run_ranks(_one_rank_fails, 2)
    assert said == ["Rank 1: ZeroDivisionError: division by zero"] * 2
