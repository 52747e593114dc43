"""What Accelerate prepares trains every parameter as one unsharded process does: DDP, FSDP1, FSDP2,
ZeRO."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from dist_layerlr import PlanMismatch, attach, bind, plan_model
from dist_layerlr.optim import check_sharding
from dist_layerlr.plan import canonical_name
from tests.support.cases import Outcomes
from tests.support.drivers import Native, ds_config, fsdp1, fsdp1_flat, start_deepspeed, whole
from tests.support.parity import (
    GLOBAL_BATCH,
    Case,
    Measured,
    Recipe,
    Weights,
    check,
    measure,
    run_cases,
)
from tests.support.toys import TwoNormBlock

SHARED = (AcceleratorState._shared_state, PartialState._shared_state)


def fresh(**settings: Any) -> Accelerator:
    """Accelerate keeps its state in singletons, which outlive a case."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(**settings)


def plain(recipe: Recipe) -> Accelerator:
    return fresh(cpu=True, gradient_accumulation_steps=recipe.accumulate)


def sharding(recipe: Recipe, version: int = 2) -> Accelerator:
    """Accelerate ignores the plugin on CPU, so its state is written by hand."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[TwoNormBlock.__name__],
    )
    accelerator = fresh(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=recipe.accumulate)
    for state in SHARED:
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def zero(recipe: Recipe, stage: int) -> Accelerator:
    """Accelerate counts one process on CPU, so its state is written by hand."""
    settings = ds_config(stage, recipe, train_batch_size=GLOBAL_BATCH)
    accelerator = fresh(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings))
    rank = dist.get_rank()
    for state in SHARED:
        state.update(
            num_processes=dist.get_world_size(), process_index=rank, local_process_index=rank
        )
    return accelerator


class Prepared(Native):
    """Model and attached optimizer, prepared together."""

    def __init__(
        self, recipe: Recipe, start: Callable[[Recipe], Accelerator], wrap: Any, sharder: str
    ):
        model = recipe.model()
        self.plan, self.scheduler, self._recipe = plan_model(model, recipe.config), None, recipe
        self._accelerator = start(recipe)
        model = wrap(model)
        optimizer = attach(self.plan, model, recipe.make, emission=recipe.emission)
        self.model, self.optimizer = self._accelerator.prepare(model, optimizer)
        check_sharding(self.model, sharder)

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        return self._accelerator.accumulate(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """And step: Accelerate skips the micro steps before the last."""
        self._accelerator.backward(loss)
        if self._accelerator.sync_gradients and self._recipe.clip is not None:
            self._accelerator.clip_grad_norm_(self.model.parameters(), self._recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        assert self._accelerator.sync_gradients


class PreparedZero(Prepared):
    """An engine brings its own optimizer, and steps in `accelerator.backward`."""

    def __init__(self, recipe: Recipe, stage: int):
        super().__init__(recipe, functools.partial(zero, stage=stage), lambda model: model, "zero")
        self.optimizer = None
        if recipe.emission == "segmented":
            bind(self.plan, self.model)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def full(self) -> Weights:
        return {canonical_name(n): whole(p) for n, p in self.model.module.named_parameters()}


def train(build: Callable[[Recipe], Prepared], recipe: Recipe) -> Measured:
    return measure(build(recipe), recipe)


def prepared(
    start: Callable[[Recipe], Accelerator], sharder: str, wrap: Any = lambda model: model
) -> Any:
    return functools.partial(Prepared, start=start, wrap=wrap, sharder=sharder)


BUILDS: dict[str, Callable[[Recipe], Prepared]] = {
    "ddp": prepared(plain, "ddp"),
    "fsdp1, wrapped before": prepared(functools.partial(sharding, version=1), "fsdp1", fsdp1),
    "fsdp1_flat, wrapped before": prepared(
        functools.partial(sharding, version=1), "fsdp1_flat", fsdp1_flat
    ),
    "fsdp2": prepared(sharding, "fsdp2"),
    **{f"zero {stage}": functools.partial(PreparedZero, stage=stage) for stage in (1, 2, 3)},
}


def case(name: str, sharder: str, **fields: Any) -> Case:
    return Case(f"{sharder}{name}", 2, functools.partial(train, BUILDS[sharder], Recipe(**fields)))


def segmented_before_fsdp2() -> Measured:
    """Accelerate swaps the tensors of the outer group only: verify must say so."""
    with pytest.raises(PlanMismatch, match="gate: not stepped by the optimizer"):
        train(BUILDS["fsdp2"], Recipe(emission="segmented"))
    return Measured(0.0, "", 0.0, 0.0)


CASES = [
    *(case("", sharder) for sharder in BUILDS),
    *(case(", sgd", sharder, optimizer="sgd", schedule="linear") for sharder in BUILDS),
    *(case(", 2 micro steps", sharder, accumulate=2) for sharder in BUILDS),
    *(
        case(", clipped", sharder, clip=0.1)
        for sharder in ("ddp", "fsdp1, wrapped before", "fsdp2", "zero 2")
    ),
    *(
        case(", segmented", sharder, emission="segmented")
        for sharder in BUILDS
        if sharder != "fsdp2"
    ),
    Case("fsdp2, segmented before prepare is refused", 2, segmented_before_fsdp2),
    *(
        case(", LoRA", sharder, lora=True)
        for sharder in ("ddp", "fsdp1, wrapped before", "zero 2", "zero 3")
    ),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[int, Outcomes]:
    return run_cases(CASES, request, start_deepspeed)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_training_ends_where_one_unsharded_process_ends(
    case: Case, outcomes: dict[int, Outcomes]
) -> None:
    check(case, outcomes)
