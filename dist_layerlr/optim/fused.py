"""Adam at many rates for the price of one: torch's fused kernel, without the optimizer's
bookkeeping around it.

The kernel takes one rate a call, so each group makes one call. ``torch.optim.AdamW(fused=True)``
spends about 20 us of Python on a group and 2 us on a tensor besides; at 1,000 rates that is more
than the arithmetic.

Private, read in torch 2.13: ``torch._fused_adamw_`` and ``torch._fused_adam_``, which those
optimizers call themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

_EXACTLY = {"fused": True, "amsgrad": False, "capturable": False, "differentiable": False}
"""Settings that the direct call stands for."""
STEP = "step"

Call = tuple[dict[str, Any], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""(group, parameters with a gradient, gradients, first moments, second moments, step counters)."""


def handles(optimizer: Optimizer) -> bool:
    """Whether ``step`` may call the kernel. Then several tensors may share one step counter."""
    return type(optimizer) in (Adam, AdamW) and all(
        group.get(key) is value
        for group in optimizer.param_groups
        for key, value in _EXACTLY.items()
    )


def step(optimizer: Optimizer) -> None:
    """Do what ``optimizer.step()`` does, for one that is handled: by one kernel call per group if
    state exists.
    """
    calls = [_gather(optimizer, group) for group in optimizer.param_groups]
    if None in calls:
        _unshare_counters(optimizer)
        optimizer.step()
        return
    ready = [call for call in calls if call is not None and call[1]]
    counters = {id(counter): counter for call in ready for counter in call[5]}
    if counters:
        torch._foreach_add_(list(counters.values()), 1)
    for group, params, gradients, first, second, steps in ready:
        beta1, beta2 = group["betas"]
        decoupled = group.get("decoupled_weight_decay", type(optimizer) is AdamW)
        kernel: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
        kernel(
            params,
            gradients,
            first,
            second,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )


def _gather(optimizer: Optimizer, group: dict[str, Any]) -> Call | None:
    """None: no state yet, or tensors of several kinds, which only the optimizer itself can take."""
    states = optimizer.state
    params = [p for p in group["params"] if p.grad is not None]
    found = [states.get(p) for p in params]
    if not all(found):
        return None
    if len(params) > 1 and len({(p.device, p.dtype) for p in params}) > 1:
        return None
    return (
        group,
        params,
        [p.grad for p in params],
        [s["exp_avg"] for s in found],  # type: ignore[index]
        [s["exp_avg_sq"] for s in found],  # type: ignore[index]
        [s[STEP] for s in found],  # type: ignore[index]
    )


def _unshare_counters(optimizer: Optimizer) -> None:
    """The optimizer itself counts up every tensor's counter."""
    for state in optimizer.state.values():
        if STEP in state:
            state[STEP] = state[STEP].clone()
