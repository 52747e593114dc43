"""Ways of training: torch's own sharders and DeepSpeed. ``sharding.py`` has a row for each."""

from __future__ import annotations

from torch import nn

from dist_layerlr.plan import Plan
from launch.trainer.engines.base import Engine
from launch.trainer.engines.sharding import Sharding
from launch.trainer.options import RunOptions
from launch.trainer.runtime import Runtime


def build_engine(
    sharding: Sharding,
    model: nn.Module,
    plan: Plan,
    options: RunOptions,
    runtime: Runtime,
    deepspeed_config: str | None,
) -> Engine:
    """Wrap the meta model, load its weights into place, and build its optimizer from the plan.

    Args:
        sharding: How ranks share the model.
        model: On the meta device.
        plan: Made from ``model``.
        options: Of the run.
        runtime: This rank.
        deepspeed_config: JSON file, if DeepSpeed shards.
    """
    if sharding.by_deepspeed:
        # Importing DeepSpeed takes seconds and prints; only its own runs pay for that.
        from launch.trainer.engines.zero import ZeroEngine

        assert deepspeed_config is not None
        return ZeroEngine(model, plan, options, runtime, deepspeed_config)
    from launch.trainer.engines.native import NativeEngine

    return NativeEngine(sharding, model, plan, options, runtime)
