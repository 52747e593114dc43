"""DeepSpeed in one call, by its fastest way: one parameter group outside, all rates inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dist_layerlr.files import read_json
from dist_layerlr.optim import MakeOptimizer, attach, bind, check_ds_config
from dist_layerlr.optim.routed import MakeOptimizers
from dist_layerlr.plan import Plan
from dist_layerlr.ranks import alike


def initialize_deepspeed(
    plan: Plan,
    model: nn.Module,
    make: MakeOptimizer | MakeOptimizers,
    config: Mapping[str, Any] | str | Path,
    **more: Any,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with every parameter at its planned rate. Collective.

    It does what four calls would: ``check_ds_config``, ``attach`` in segments,
    ``deepspeed.initialize``, ``bind``. DeepSpeed sees one parameter group, so a step costs what one
    flat learning rate costs at every ZeRO stage.

    Args:
        plan: made from the model before this call (or from its meta-device twin).
        model: not wrapped; under ``zero.Init`` already partitioned.
        make: groups -> optimizer, such as ``lambda groups: torch.optim.AdamW(groups, fused=True)``.
        config: the ds_config or the path of its file, without an optimizer or scheduler block.
        **more: further arguments of ``deepspeed.initialize`` (``training_data``, ``mpu`` ...).

    Returns:
        What ``deepspeed.initialize`` returns: (engine, optimizer, dataloader, scheduler).

    Raises:
        ConfigError: a ds_config that would overwrite planned rates, or an optimizer that cannot
            step slices.
        PlanMismatch: the model's trainable parameters are not those of the plan.
    """
    import deepspeed

    settings = alike(lambda: _checked(config))
    optimizer = attach(plan, model, make, emission="segmented")
    found: tuple[Any, Any, Any, Any] = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, **more
    )
    # DeepSpeed has put the parameters into flat partitions: only now is it known where names lie.
    bind(plan, found[0])
    return found


def _checked(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    settings = read_json(config) if isinstance(config, (str, Path)) else dict(config)
    check_ds_config(settings)
    return settings
