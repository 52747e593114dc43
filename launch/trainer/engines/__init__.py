"""Ways of training: one file each, one line here."""

from __future__ import annotations

from torch import nn

from dist_layerlr.plan.entries import Plan
from launch.trainer.engines.base import Engine
from launch.trainer.options import RunOptions
from launch.trainer.runtime import Runtime

SHARDINGS = ("none", "ddp", "fsdp1", "fsdp1_flat", "fsdp2", "hsdp")
ZERO = "zero"


def build_engine(
    sharding: str,
    model: nn.Module,
    plan: Plan,
    options: RunOptions,
    runtime: Runtime,
    deepspeed_config: str | None,
) -> Engine:
    """Wrap the meta model, load its weights into place, and build its optimizer from the plan.

    Args:
        sharding: one of SHARDINGS, or ZERO.
        model: on the meta device.
        plan: made from ``model``.
        options: of the run.
        runtime: this rank.
        deepspeed_config: JSON file, with ZERO.
    """
    if sharding == ZERO:
        from launch.trainer.engines.zero import ZeroEngine

        assert deepspeed_config is not None
        return ZeroEngine(model, plan, options, runtime, deepspeed_config)
    from launch.trainer.engines.native import NativeEngine

    return NativeEngine(sharding, model, plan, options, runtime)
