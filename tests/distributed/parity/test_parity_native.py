"""DDP, FSDP1, FSDP2 and HSDP train every parameter as one unsharded process does, whatever runs
inside them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import (
    OptimizedModule,
)  # before the fork: the import takes longer than all cases that need it
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecision, MixedPrecisionPolicy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy

from tests.support.cases import Outcomes
from tests.support.drivers import SHARDERS, Native, Wrap, fsdp1, fsdp1_flat, fsdp2
from tests.support.parity import (
    Case,
    Measured,
    Recipe,
    check,
    measure,
    no_worse_than_flat,
    run_cases,
)
from tests.support.toys import Frozen


def fsdp1_hybrid(model: nn.Module, *, flat: bool) -> FSDP:
    return fsdp1(
        model, flat=flat, strategy="HYBRID_SHARD", device_mesh=init_device_mesh("cpu", (2, 2))
    )


def fsdp1_flat_lora(model: nn.Module) -> FSDP:
    """A flat parameter cannot mix trained and frozen, so every trained leaf is a unit."""
    trained = CustomPolicy(
        lambda m: bool(p := list(m.parameters(recurse=False))) and p[0].requires_grad
    )
    return fsdp1(model, flat=True, policy=trained)


def in_blocks(change: Callable[[nn.Module], Any], wrap: Wrap) -> Wrap:
    """Change every block, then wrap the model."""

    def wrapped(model: Any) -> Any:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = change(block)
        return wrap(model)

    return wrapped


compiled = functools.partial(torch.compile, backend="eager")


def train(wrap: Wrap, recipe: Recipe) -> Measured:
    driver = Native(wrap, recipe)
    return measure(driver, recipe, driver.scheduler)


BF16 = {
    "fsdp1": functools.partial(
        fsdp1, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32)
    ),
    "fsdp1_flat": functools.partial(
        fsdp1_flat, mixed_precision=MixedPrecision(torch.bfloat16, torch.float32)
    ),
    "fsdp2": functools.partial(
        fsdp2, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    ),
}
LORA_SHARDERS: dict[str, Wrap] = {**SHARDERS, "fsdp1_flat": fsdp1_flat_lora}
COMPILED_UNITS = ModuleWrapPolicy({OptimizedModule, Frozen})
COMPILED_SHARDERS: dict[str, Wrap] = {
    **SHARDERS,
    "fsdp1": lambda model: fsdp1(model, policy=COMPILED_UNITS),
    "fsdp1_flat": lambda model: fsdp1(model, flat=True, policy=COMPILED_UNITS),
}
VARIANTS: dict[str, Wrap] = {
    "fsdp1 SHARD_GRAD_OP": functools.partial(fsdp1, strategy="SHARD_GRAD_OP"),
    "fsdp1 NO_SHARD": functools.partial(fsdp1, strategy="NO_SHARD"),
    "fsdp1_flat SHARD_GRAD_OP": functools.partial(fsdp1_flat, strategy="SHARD_GRAD_OP"),
    "fsdp1_flat NO_SHARD": functools.partial(fsdp1_flat, strategy="NO_SHARD"),
    "fsdp2 with CPU offload": functools.partial(
        fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
    "fsdp2 kept gathered after forward": functools.partial(fsdp2, reshard_after_forward=False),
    "fsdp2 as HSDP 2x1": functools.partial(fsdp2, mesh=(2, 1)),
    **{
        f"{n} of compiled blocks": in_blocks(compiled, wrap)
        for n, wrap in COMPILED_SHARDERS.items()
    },
    **{
        f"{n} of checkpointed blocks": in_blocks(checkpoint_wrapper, wrap)
        for n, wrap in SHARDERS.items()
    },
    **{
        f"compiled {n}": (lambda model, wrap=wrap: compiled(wrap(model)))
        for n, wrap in SHARDERS.items()
    },
}
FOUR_RANKS: dict[str, Wrap] = {
    **SHARDERS,
    "fsdp2 as HSDP 2x2": functools.partial(fsdp2, mesh=(2, 2)),
    "fsdp1 HYBRID_SHARD 2x2": functools.partial(fsdp1_hybrid, flat=False),
    "fsdp1_flat HYBRID_SHARD 2x2": functools.partial(fsdp1_hybrid, flat=True),
}


def case(name: str, wrap: Wrap, ranks: int = 2, **fields: Any) -> Case:
    return Case(name, ranks, functools.partial(train, wrap, Recipe(**fields)))


def bf16_case(name: str, wrap: Wrap) -> Case:
    return Case(
        f"{name}, bf16",
        2,
        functools.partial(no_worse_than_flat, functools.partial(train, wrap), Recipe()),
    )


CASES = [
    *(
        case(f"{n}, {o}", w, optimizer=o)
        for n, w in SHARDERS.items()
        for o in ("adamw", "foreach", "fused", "sgd")
    ),
    *(case(n, w, schedule="linear") for n, w in VARIANTS.items()),
    *(case(f"{n}, segmented", w, emission="segmented") for n, w in SHARDERS.items()),
    *(case(f"{n}, 2 micro steps", w, accumulate=2) for n, w in SHARDERS.items()),
    *(case(f"{n}, clipped", w, clip=0.1) for n, w in SHARDERS.items()),
    *(case(f"{n}, LambdaLR", w, schedule="lambda") for n, w in SHARDERS.items()),
    *(case(f"{n}, LoRA", w, lora=True) for n, w in LORA_SHARDERS.items()),
    *(bf16_case(n, w) for n, w in BF16.items()),
    *(case(n, w, ranks=1) for n, w in SHARDERS.items()),
    *(case(n, w, ranks=4) for n, w in FOUR_RANKS.items()),
    *(case(f"{n}, LoRA", w, ranks=4, lora=True) for n, w in LORA_SHARDERS.items()),
]


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[int, Outcomes]:
    return run_cases(CASES, request)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_training_ends_where_one_unsharded_process_ends(
    case: Case, outcomes: dict[int, Outcomes]
) -> None:
    check(case, outcomes)
