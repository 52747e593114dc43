"""Modes of a DeepSpeed engine under which no element can be told by name, read off the engine.

A ds_config that nobody has checked may switch them on. Private, read in deepspeed 0.19.8:
``optimizer.round_robin_gradients`` (stages 1 and 2), ``engine.zenflow``, ``engine.autotp_size()``.
"""

from __future__ import annotations

from typing import Any

from dist_layerlr.errors import ConfigError


def refuse_modes(engine: Any) -> None:
    """Refuse an engine whose weights or rates would be read back wrong.

    Raises:
        ConfigError: naming the setting, what it does, and what to write instead.
    """
    if any(kind.__name__ == "PipelineEngine" for kind in type(engine).__mro__):
        raise ConfigError(
            "Invalid DeepSpeed PipelineModule: each stage numbers its own layers, so that names are"
            " not those of the model that was planned. Use ZeRO without pipeline stages."
        )
    stage = int(engine.zero_optimization_stage())
    if stage in (1, 2) and getattr(engine.optimizer, "round_robin_gradients", False):
        raise ConfigError(
            "Invalid ds_config zero_optimization.round_robin_gradients=true: DeepSpeed then trains"
            f" and reads back wrong weights at stage {stage}. Remove it."
        )
    if getattr(engine, "zenflow", False):
        raise ConfigError(
            "Invalid ds_config zero_optimization.zenflow: it steps chosen columns of transposed"
            " matrices at another time than the rest. Remove it."
        )
    autotp_size = getattr(engine, "autotp_size", int)()
    if autotp_size > 1:
        raise ConfigError(
            f"Invalid ds_config tensor_parallel.autotp_size={autotp_size}: DeepSpeed replaces"
            " modules by parts of them and keeps no global shape, so that half a tensor would be"
            " taken for a whole one. Set it to 1, or use torch's parallelize_module."
        )
