"""DeepSpeed ZeRO 0 to 2: after ``deepspeed.initialize`` the groups hold one flat partition each, and names are gone.

The engine keeps ``param_names`` of the unwrapped module; the optimizer keeps the original parameters of each group in
the same order as its ``param_groups``. Read in deepspeed 0.19.8: stage 0 ``param_groups`` (or ``fp16_groups``,
``bf16_groups`` of the mixed precision optimizers), stage 1 and 2 ``bit16_groups`` with ``_hp_mapping`` per parameter.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from dist_layerlr.adapters.base import LiveParam, ReadBack
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.names import canonical_name


class ZeroAdapter:
    """Original parameters of each group, and the fragment of them that this rank steps."""

    label = "zero"

    def handles(self, model: nn.Module) -> bool:
        """Whether the model is a DeepSpeed engine."""
        return any(c.__name__ == "DeepSpeedEngine" for c in type(model).__mro__)

    def read_back(self, model: nn.Module, optimizer: Any = None) -> ReadBack:
        """Read the engine's own optimizer; ``optimizer`` is ignored, it may be a stale outer object."""
        engine: Any = model
        stage = engine.zero_optimization_stage()
        self.label = f"zero {stage}"
        live_optimizer = engine.optimizer
        names = {id(p): canonical_name(n) for n, p in engine.module.named_parameters()}
        result = ReadBack()
        strangers = 0
        for group, params in zip(live_optimizer.param_groups, _group_params(live_optimizer, stage), strict=True):
            for param in params:
                name = names.get(id(param))
                if name is None:
                    strangers += 1
                    continue
                if name in result.live:
                    result.repeated.append(name)
                numel, replicas = _count(param, stage)
                result.live[name] = LiveParam(
                    lr=float(group["lr"]),
                    weight_decay=float(group.get("weight_decay", 0.0)),
                    numel=numel,
                    replicas=replicas,
                )
        return ReadBack(live=result.live, repeated=result.repeated, strangers=strangers)


def _group_params(optimizer: Any, stage: int) -> list[list[nn.Parameter]]:
    """The original parameters of each live group."""
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute) and stage < 3:
            return [list(group) for group in getattr(optimizer, attribute)]
    if stage == 0:
        return [list(group["params"]) for group in optimizer.param_groups]
    raise PlanMismatch(
        f"Cannot read back ZeRO stage {stage} from {type(optimizer).__name__}. Supported stages: 0, 1, 2. "
        "If this stage worked before, DeepSpeed changed its internals: report the version."
    )


def _count(param: nn.Parameter, stage: int) -> tuple[int, int]:
    """(elements of this rank's partition, ranks that hold them)."""
    if stage == 0:
        return param.numel(), dist.get_world_size()
    mapping = getattr(param, "_hp_mapping", None)
    return (mapping.get_hp_fragment_address().numel if mapping is not None else 0), 1
