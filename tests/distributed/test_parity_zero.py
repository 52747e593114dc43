"""DeepSpeed ZeRO 0 to 3 trains every parameter as one unsharded process does: offload, zero.Init, hpZ, bf16, LoRA."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import deepspeed
import pytest
import torch
import torch._dynamo  # noqa: F401  before the fork, as DeepSpeed's parts: imports take longer than most cases
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.fp16 import unfused_optimizer  # noqa: F401
from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401
from deepspeed.utils import safe_get_full_fp32_param
from torch.optim.lr_scheduler import LambdaLR

from dist_layerlr import attach, canonical_name, check_ds_config, plan_model
from parity import (
    GLOBAL_BATCH,
    Case,
    Measured,
    Outcome,
    Recipe,
    Weights,
    check,
    measure,
    no_worse_than_flat,
    run_cases,
    start_deepspeed,
)

bf16_optimizer.see_memory_usage = lambda *_, **__: None  # collects garbage for every group
STAGES = (0, 1, 2, 3)
CPU = {"device": "cpu"}
BF16 = {"bf16": {"enabled": True}}
UNFORCED = {"zero_force_ds_cpu_optimizer": False}  # else DeepSpeed compiles its CPUAdam, for minutes


def ds_config(stage: int, recipe: Recipe, **fields: Any) -> dict[str, Any]:
    """A config that changes no arithmetic; ``zero`` holds more of its zero_optimization block."""
    ranks = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks // recipe.accumulate,
        "gradient_accumulation_steps": recipe.accumulate,
        "zero_optimization": {"stage": stage, **fields.pop("zero", {})},
        "gradient_clipping": recipe.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **fields,
    }
    check_ds_config(config)
    return config


class Zero:
    """A model in a DeepSpeed engine."""

    optimizer = None

    def __init__(self, recipe: Recipe, stage: int, *, zero_init: bool = False, compiled: bool = False, **fields: Any):
        config = ds_config(stage, recipe, **fields)
        with deepspeed.zero.Init(config_dict_or_path=config) if zero_init else nullcontext():
            model: Any = recipe.model()
        for block in model.blocks if compiled else ():
            block.compile(backend="eager")
        self.plan = plan_model(model, recipe.config)
        optimizer = attach(self.plan, model, recipe.make)
        self.scheduler = LambdaLR(optimizer, recipe.factor) if recipe.schedule == "lambda" else None
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self.scheduler, config=config
        )
        if "bf16" in fields:
            self.model.module.register_forward_pre_hook(lambda _, inputs: tuple(x.bfloat16() for x in inputs))

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """And step: the engine counts micro steps, and steps at the last one."""
        self.model.backward(loss)
        self.model.step()

    def step(self) -> None:
        pass

    def full(self) -> Weights:
        return {canonical_name(n): whole(p) for n, p in self.model.module.named_parameters()}


def whole(param: Any) -> torch.Tensor:
    """The fp32 master weight, or the weight where there is none."""
    master = safe_get_full_fp32_param(param) if param.requires_grad else None
    if master is not None:
        return master.detach().clone().float()
    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return param.detach().clone().float()


def train(recipe: Recipe, stage: int, **settings: Any) -> Measured:
    driver = Zero(recipe, stage, **settings)
    return measure(driver, recipe, driver.scheduler)


def case(name: str, stage: int, ranks: int = 2, recipe: Recipe | None = None, **settings: Any) -> Case:
    return Case(f"zero {stage}{name}", ranks, functools.partial(train, recipe or Recipe(), stage, **settings))


def bf16_case(name: str, stage: int, **settings: Any) -> Case:
    run = functools.partial(train, stage=stage, **BF16, **settings)
    return Case(f"zero {stage}, bf16{name}", 2, functools.partial(no_worse_than_flat, run, Recipe()))


OPTIMIZER_OFFLOAD = {"zero": {"offload_optimizer": CPU}, **UNFORCED}
CASES = [
    *(case(f", {o}", s, recipe=Recipe(optimizer=o)) for s in STAGES for o in ("adamw", "sgd")),
    *(case(", fused", s, recipe=Recipe(optimizer="fused")) for s in (1, 3)),
    *(case(", LambdaLR", s, recipe=Recipe(schedule="lambda")) for s in (0, 2)),
    *(case(", clipped", s, recipe=Recipe(clip=0.1)) for s in (1, 3)),
    *(case(", 2 micro steps", s, recipe=Recipe(accumulate=2)) for s in STAGES),
    *(case(", LoRA", s, recipe=Recipe(lora=True)) for s in STAGES),
    *(case(", compiled blocks", s, compiled=True) for s in (2, 3)),
    *(case(", optimizer offload", s, **OPTIMIZER_OFFLOAD) for s in (1, 2, 3)),
    case(", gradients not contiguous", 2, zero={"contiguous_gradients": False}),
    case(", optimizer and parameter offload", 3, zero={"offload_optimizer": CPU, "offload_param": CPU}, **UNFORCED),
    case(", small sub-groups", 3, zero={"sub_group_size": 500}),
    case(", zero.Init", 3, zero_init=True),
    case(", hpZ", 3, zero={"zero_hpz_partition_size": 2}),
    *(bf16_case("", s) for s in STAGES),
    bf16_case(" with fp32 accumulation", 1, data_types={"grad_accum_dtype": "fp32"}),
    *(case("", s, ranks=1) for s in (1, 3)),
    *(case(", linear", s, ranks=4, recipe=Recipe(schedule="linear")) for s in STAGES),
    case(", LoRA", 3, ranks=4, recipe=Recipe(lora=True)),
    case(", hpZ of half the ranks", 3, ranks=4, zero={"zero_hpz_partition_size": 2}),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    return run_cases(CASES, request, start_deepspeed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_training_ends_where_one_unsharded_process_ends(case: Case, outcomes: dict[str, list[Outcome]]) -> None:
    check(case, outcomes[case.id])
