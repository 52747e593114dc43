"""DeepSpeed ZeRO 0 to 3 trains every parameter as one unsharded process does: offload, zero.Init,
hpZ, bf16, LoRA."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.support.cases import Outcomes
from tests.support.drivers import Zero, start_deepspeed
from tests.support.parity import (
    Case,
    Measured,
    Recipe,
    check,
    measure,
    no_worse_than_flat,
    run_cases,
)

STAGES = (0, 1, 2, 3)
CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
UNFORCED = {
    "zero_force_ds_cpu_optimizer": False
}  # else DeepSpeed compiles its CPUAdam, for minutes


def train(recipe: Recipe, stage: int, **settings: Any) -> Measured:
    driver = Zero(recipe, stage, **settings)
    return measure(driver, recipe, driver.scheduler)


def case(
    name: str, stage: int, ranks: int = 2, recipe: Recipe | None = None, **settings: Any
) -> Case:
    return Case(
        f"zero {stage}{name}",
        ranks,
        functools.partial(train, recipe or Recipe(), stage, **settings),
    )


def bf16_case(name: str, stage: int, **settings: Any) -> Case:
    recipe = Recipe(emission=settings.pop("emission", "auto"))
    run = functools.partial(train, stage=stage, **BF16, **settings)
    return Case(f"zero {stage}, bf16{name}", 2, functools.partial(no_worse_than_flat, run, recipe))


OPTIMIZER_OFFLOAD = {"zero": {"offload_optimizer": CPU}, **UNFORCED}
CASES = [
    *(case(f", {o}", s, recipe=Recipe(optimizer=o)) for s in STAGES for o in ("adamw", "sgd")),
    *(case(", fused", s, recipe=Recipe(optimizer="fused")) for s in (1, 3)),
    *(case(", LambdaLR", s, recipe=Recipe(schedule="lambda")) for s in (0, 2)),
    *(case(", clipped", s, recipe=Recipe(clip=0.1)) for s in (1, 3)),
    *(case(", 2 micro steps", s, recipe=Recipe(accumulate=2)) for s in STAGES),
    *(case(", LoRA", s, recipe=Recipe(lora=True)) for s in STAGES),
    *(case(", segmented", s, recipe=Recipe(emission="segmented")) for s in STAGES),
    *(
        case(", segmented, sgd", s, recipe=Recipe(emission="segmented", optimizer="sgd"))
        for s in (1, 3)
    ),
    case(", segmented, LoRA", 3, recipe=Recipe(emission="segmented", lora=True)),
    *(case(", a compiled block", s, compiled=True) for s in (2, 3)),
    *(case(", optimizer offload", s, **OPTIMIZER_OFFLOAD) for s in (1, 2, 3)),
    case(", gradients not contiguous", 2, zero={"contiguous_gradients": False}),
    case(
        ", optimizer and parameter offload",
        3,
        zero={"offload_optimizer": CPU, "offload_param": CPU},
        **UNFORCED,
    ),
    case(", small sub-groups", 3, zero={"sub_group_size": 500}),
    case(", zero.Init", 3, zero_init=True),
    *(bf16_case("", s) for s in STAGES),
    bf16_case(", segmented", 2, emission="segmented"),
    bf16_case(" with fp32 accumulation", 1, data_types={"grad_accum_dtype": "fp32"}),
    *(case("", s, ranks=1) for s in (1, 3)),
    *(case(", linear", s, ranks=4, recipe=Recipe(schedule="linear")) for s in STAGES),
    case(", LoRA", 3, ranks=4, recipe=Recipe(lora=True)),
    case(", hpZ of half the ranks", 3, ranks=4, zero={"zero_hpz_partition_size": 2}),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[int, Outcomes]:
    return run_cases(CASES, request, start_deepspeed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_training_ends_where_one_unsharded_process_ends(
    case: Case, outcomes: dict[int, Outcomes]
) -> None:
    check(case, outcomes)
