"""DeepSpeed engines on naive groups and on ours, for the silent failures of ZeRO."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import deepspeed
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import dist_layerlr
from tests.support.cases import At
from tests.support.naive import (
    CONFIG,
    Weights,
    adamw,
    batch,
    copy_of,
    make_model,
    movement,
    naive_groups,
    train,
)


def ds_config(stage: int, zero: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **fields,
    }


def start(model: nn.Module, optimizer: Any, settings: dict[str, Any], **more: Any) -> Any:
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, **more)[0]


def naive_engine(stage: int, make: Any = adamw, **fields: Any) -> Any:
    model = make_model()
    return start(model, make(naive_groups(model.named_parameters())), ds_config(stage, **fields))


def our_engine(stage: int, rule: Any = CONFIG, make: Any = adamw, **fields: Any) -> tuple[Any, Any]:
    """(plan, engine), as the README says."""
    model = make_model()
    plan = dist_layerlr.plan_model(model, rule)
    settings = ds_config(stage, **fields)
    dist_layerlr.optim.check_ds_config(settings)
    return plan, start(model, dist_layerlr.attach(plan, model, make), settings)


def run(engine: Any, at: At, steps: int = 1, first: int = 0, scale: float = 1.0) -> None:
    for step in range(first, first + steps):
        x, y = batch(step, at.rank)
        engine.backward(scale * F.mse_loss(engine(x), y))
        engine.step()


def masters(engine: Any) -> Weights:
    """Full fp32 weights by name."""
    found = {}
    for name, param in engine.module.named_parameters():
        value = safe_get_full_fp32_param(param) if param.requires_grad else None
        found[name] = (param if value is None else value).detach().clone()
    return found


def group_rates(engine: Any) -> list[float]:
    return [group["lr"] for group in engine.optimizer.param_groups]


def trained(steps: int, make: Any = adamw) -> Weights:
    model = make_model()
    train(model, make(naive_groups(model.named_parameters())), steps=steps)
    return copy_of(model)


def wrong(a: Weights, b: Weights, tolerance: float = 1e-6) -> list[str]:
    return [name for name, much in movement(a, b).items() if much > tolerance]


@contextlib.contextmanager
def silence() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
