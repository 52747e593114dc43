"""Per-layer learning rates by parameter name, true through every sharder and proven on every rank.

The names below are what a training script needs; the rest is public in its package:
``dist_layerlr.plan``, ``sharders``, ``optim``, ``proof``, ``weights``, ``checkpoint``, ``export``,
``offload``, ``report``. Importing this package does not import torch: names and shapes are enough
for a plan.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_layerlr.checkpoint import load_checkpoint as load_checkpoint
    from dist_layerlr.checkpoint import save_checkpoint as save_checkpoint
    from dist_layerlr.errors import ConfigError as ConfigError
    from dist_layerlr.errors import LayerLRError as LayerLRError
    from dist_layerlr.errors import PlanMismatch as PlanMismatch
    from dist_layerlr.export import export_weights as export_weights
    from dist_layerlr.integrations import initialize_deepspeed as initialize_deepspeed
    from dist_layerlr.offload import StreamPolicy as StreamPolicy
    from dist_layerlr.offload import stream as stream
    from dist_layerlr.optim import CellMetrics as CellMetrics
    from dist_layerlr.optim import PlanSchedule as PlanSchedule
    from dist_layerlr.optim import Schedule as Schedule
    from dist_layerlr.optim import bind as bind
    from dist_layerlr.optim import clip_grad_norm as clip_grad_norm
    from dist_layerlr.optim.attach import attach as attach
    from dist_layerlr.plan import Plan as Plan
    from dist_layerlr.plan import build_plan as build_plan
    from dist_layerlr.plan import plan_diff as plan_diff
    from dist_layerlr.plan import read_model as read_model
    from dist_layerlr.plan import register_component_rule as register_component_rule
    from dist_layerlr.plan import register_depth as register_depth
    from dist_layerlr.proof import effect_check as effect_check
    from dist_layerlr.proof.verify import verify as verify
    from dist_layerlr.sharders import plan_model as plan_model

__version__ = "0.1.0"

_PACKAGE_OF = {
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "ConfigError": "errors",
    "LayerLRError": "errors",
    "PlanMismatch": "errors",
    "export_weights": "export",
    "initialize_deepspeed": "integrations",
    "StreamPolicy": "offload",
    "stream": "offload",
    "CellMetrics": "optim",
    "PlanSchedule": "optim",
    "Schedule": "optim",
    "attach": "optim",
    "bind": "optim",
    "clip_grad_norm": "optim",
    "Plan": "plan",
    "build_plan": "plan",
    "plan_diff": "plan",
    "read_model": "plan",
    "register_component_rule": "plan",
    "register_depth": "plan",
    "effect_check": "proof",
    "verify": "proof",
    "plan_model": "sharders",
}
"""{public name: package that defines it}; the imports above tell type checkers the same."""

_MOVED = {
    "CheckpointError": "errors",
    "ModelSourceError": "errors",
    "OffloadError": "errors",
    "UnmatchedParams": "errors",
    "Config": "plan",
    "ParamInfo": "plan",
    "PlanEntry": "plan",
    "canonical_name": "plan",
    "load_config": "plan",
    "explain": "report",
    "grid": "report",
    "materialize": "sharders",
    "partition_empty": "sharders",
    "check_ds_config": "optim",
    "check_optimizer": "optim",
    "check_scheduler": "optim",
    "check_sharding": "optim",
    "optimizer_state": "optim",
    "param_groups": "optim",
    "read_back": "optim",
    "scale_lrs": "optim",
    "Proof": "proof",
    "check_manifest": "proof",
    "manifest": "proof",
    "reapply": "proof",
    "check_pretrained": "weights",
    "find_not_finite": "weights",
    "load_pretrained": "weights",
    "Restored": "checkpoint",
    "Saving": "checkpoint",
    "find_checkpoint": "checkpoint",
    "load_deepspeed": "checkpoint",
    "resume_plan": "checkpoint",
    "save_deepspeed": "checkpoint",
    "export_checkpoint": "export",
}
"""Names that stood here in 0.1 and are imported from their package now. They go in 0.3."""

_PACKAGES = frozenset(
    "audit checkpoint errors exchange export integrations offload optim plan proof report sharders"
    " weights".split()
)

__all__ = sorted(_PACKAGE_OF)

# Type checkers must not see __getattr__: with it, every misspelt name would be an Any.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Resolve public names and packages on first use: torch loads only when it is needed."""
        if name in _PACKAGES:
            # `import dist_layerlr` alone binds no package; this lets users write
            # dist_layerlr.optim.
            return importlib.import_module(f"{__name__}.{name}")
        if name in _PACKAGE_OF:
            return getattr(importlib.import_module(f"{__name__}.{_PACKAGE_OF[name]}"), name)
        if name in _MOVED:
            place = f"{__name__}.{_MOVED[name]}"
            warnings.warn(
                f"Import {name} from {place}; it leaves {__name__} in 0.3.", DeprecationWarning, 2
            )
            return getattr(importlib.import_module(place), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *sorted(_PACKAGES)]
