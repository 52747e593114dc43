"""Per-layer learning rates by parameter name, true through every sharder and proven on every rank.

Importing this package does not import torch: names and shapes are enough for a plan.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "LayerLRError": "errors",
    "ConfigError": "errors",
    "ModelSourceError": "errors",
    "UnmatchedParams": "errors",
    "PlanMismatch": "errors",
    "OffloadError": "errors",
    "Config": "config",
    "load_config": "config",
    "ParamInfo": "plan",
    "Plan": "plan",
    "PlanEntry": "plan",
    "build_plan": "build",
    "plan_diff": "diff",
    "canonical_name": "names",
    "register_depth": "depth",
    "register_component_rule": "components",
    "Schedule": "schedule",
    "grid": "report",
    "explain": "report",
    "read_model": "sources",
    "plan_model": "model",
    "param_groups": "groups",
    "scale_lrs": "groups",
    "attach": "proof",
    "bind": "proof",
    "read_back": "proof",
    "optimizer_state": "proof",
    "effect_check": "effect",
    "PlanSchedule": "scheduling",
    "check_scheduler": "guard",
    "check_ds_config": "guard",
    "check_optimizer": "guard",
    "check_sharding": "guard",
    "reapply": "resume",
    "manifest": "resume",
    "check_manifest": "resume",
    "materialize": "model",
    "partition_empty": "adapters.zero",
    "check_pretrained": "loading",
    "load_pretrained": "loading",
    "CheckpointError": "errors",
    "save_checkpoint": "checkpoint.save",
    "Saving": "checkpoint.save",
    "load_checkpoint": "checkpoint.load",
    "Restored": "checkpoint.load",
    "find_checkpoint": "checkpoint.load",
    "resume_plan": "checkpoint.load",
    "save_deepspeed": "checkpoint.engine",
    "load_deepspeed": "checkpoint.engine",
    "export_weights": "export",
    "find_not_finite": "gather",
    "export_checkpoint": "export",
    "clip_grad_norm": "clip",
    "verify": "proof",
    "Proof": "proof",
    "stream": "offload",
    "StreamPolicy": "offload.policy",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Resolve public names on first use, so that the torch parts load only when they are asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
