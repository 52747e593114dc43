"""Muon for matrices and AdamW for the rest end where one process ends, under every sharder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cases import Outcomes, items_of, run_bodies
from tests.support.drivers import start_deepspeed
from tests.support.naive_deepspeed import silence
from tests.support.several import BAR, LAYOUTS, LORA, NET, WAN, Case, Run, distance, reference_of

CASES: dict[str, Case] = {"blocks": NET, "lora": LORA, "wan": WAN}
CELLS = [f"{case}: {layout}" for case in CASES for layout in LAYOUTS]
# FSDP1 flattens no block of which a part is frozen.
CELLS.remove("lora: fsdp1_flat")
# Diffusers asks a parameter of the time embedder for its dtype, of which FSDP1 leaves none there.
CELLS.remove("wan: fsdp1_flat")


def ends_as_alone(cell: str) -> float:
    name, _, layout = cell.partition(": ")
    case = CASES[name]
    with silence():
        run = Run(case, layout)
        run.train()
        return distance(run.weights(), reference_of(case))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    chosen = {item.callspec.params["cell"] for item in items_of(request)}

    def body(cell: str) -> object:
        return lambda at: ends_as_alone(cell)

    bodies = {cell: body(cell) for cell in CELLS if cell in chosen}
    yield run_bodies(bodies, request.param, start_deepspeed)


@pytest.mark.parametrize("cell", CELLS)
def test_the_weights_are_those_of_one_process(cell: str, outcomes: Outcomes) -> None:
    for far in outcomes.settle(cell):
        assert far < BAR
        print(cell, far)
