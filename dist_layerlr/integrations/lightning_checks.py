"""What ``LayerLRLightning`` refuses before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations.checks import refuse_ds_config


def check_strategy(strategy: Any) -> None:
    """Refuse what a DeepSpeedStrategy's config would do to the plan, and complete it.

    Raises:
        ConfigError: names the block.
    """
    config = getattr(strategy, "config", None)
    if not isinstance(config, dict):
        return
    # The strategy fills in the clipping later, from the Trainer's argument.
    given = {"gradient_clipping": 0.0, **config}
    refuse_ds_config(given, scheduler="LayerLRLightning.optimizers(make, schedule)")
    # ``attach`` tries the optimizer, of which DeepSpeed knows only the outside.
    config.setdefault("zero_allow_untested_optimizer", True)


def refuse_unplanned(trainer: Any) -> None:
    """Refuse an optimizer for a module that nobody has planned.

    Raises:
        ConfigError: the callback was not given to the Trainer.
    """
    if trainer is None:
        raise ConfigError(
            "Invalid Trainer: it has no LayerLRLightning among its callbacks, so that nothing was"
            " planned before the strategy wrapped the module. Give Trainer(callbacks=[...]) the one"
            " whose optimizers() you call."
        )


def refuse_other_optimizer(optimizer: Any) -> None:
    """Refuse a module that builds an optimizer of its own.

    Raises:
        ConfigError: ``optimizers()`` was not called.
    """
    if optimizer is None:
        raise ConfigError(
            "Invalid configure_optimizers: it does not return LayerLRLightning.optimizers(...), so"
            " that the module would train without its plan."
        )


def refuse_foreign(checkpoint: Any, rows: Any) -> None:
    """Refuse to resume from a checkpoint that no LayerLRLightning has written.

    Raises:
        ConfigError: it holds no plan.
    """
    if checkpoint and rows is None:
        raise ConfigError(
            f"Invalid ckpt_path={str(checkpoint)!r}: it has no plan, so that it was trained without"
            " LayerLRLightning, and its optimizer state lies in another order. Start from its"
            " weights (load_from_checkpoint) without resuming."
        )


def lost_under_fsdp1(checkpoint: Any) -> str | None:
    """What is wrong in a checkpoint if it is of FSDP1; None: nothing."""
    if not Path(checkpoint).is_file():
        return None  # a folder of shards
    return (
        "torch writes wrong first moments into whole checkpoints of it. Write them with"
        " FSDPStrategy(state_dict_type='sharded'), or train with ModelParallelStrategy."
    )
