"""What integrations refuse alike, whatever trainer calls DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim import check_ds_config


def refuse_ds_config(config: Mapping[str, Any], *, scheduler: str) -> None:
    """Refuse settings of a ds_config that the trainer or DeepSpeed would let change the plan.

    Args:
        config: as the trainer gives it to ``deepspeed.initialize``.
        scheduler: where the trainer's users name a scheduler.

    Raises:
        ConfigError: names the setting and what to write instead.
    """
    if config.get("scheduler"):
        raise ConfigError(
            f"Invalid ds_config 'scheduler' block {config['scheduler'].get('type')!r}: remove it,"
            f" and name the scheduler in {scheduler}."
        )
    check_ds_config(config)


def refuse_replaced_optimizer(config: Mapping[str, Any]) -> None:
    """Refuse offload where Accelerate exchanges the optimizer for DeepSpeed's own.

    Raises:
        ConfigError: names the block.
    """
    for block in ("offload_optimizer", "offload_param"):
        device = (config.get("zero_optimization", {}).get(block) or {}).get("device", "none")
        if device != "none":
            raise ConfigError(
                f"Invalid ds_config zero_optimization.{block}.device={device!r}: Accelerate then"
                " builds DeepSpeedCPUAdam in place of the planned optimizer. Remove it, or use"
                " initialize_deepspeed in a loop of your own."
            )
