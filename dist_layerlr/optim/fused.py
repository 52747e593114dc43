"""Adam at many rates for the price of one: torch's fused kernel, called directly.

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
    """Whether ``step`` may call the kernel. Then several tensors may share one step counter.

    A subclass may do more than its parent in ``step``: only the two classes themselves qualify.
    """
    if type(optimizer) not in (Adam, AdamW):
        return False
    return all(_EXACTLY.items() <= group.items() for group in optimizer.param_groups)


def step(optimizer: Optimizer) -> None:
    """Do what ``optimizer.step()`` does, for one that is handled, in one kernel call per group.

    Without state (the first step), or for tensors of several kinds, the optimizer itself steps.
    """
    calls = []
    for group in optimizer.param_groups:
        call = _gather(optimizer, group)
        if call is None:
            # Torch counts up the counter of each tensor, so a shared one would count several times.
            _unshare_counters(optimizer)
            optimizer.step()
            return
        if call[1]:
            calls.append(call)
    # The kernel reads counters and leaves them as they are; a shared one is counted up once.
    counters = {id(counter): counter for call in calls for counter in call[5]}
    if counters:
        torch._foreach_add_(list(counters.values()), 1)
    for group, params, gradients, first, second, steps in calls:
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
    call: Call = (group, [], [], [], [], [])
    _, params, gradients, first, second, steps = call
    for param in group["params"]:
        gradient = param.grad
        if gradient is None:
            continue
        state = states.get(param)
        if not state:
            return None
        params.append(param)
        gradients.append(gradient)
        first.append(state["exp_avg"])
        second.append(state["exp_avg_sq"])
        steps.append(state[STEP])
    if len(params) > 1 and len({(p.device, p.dtype) for p in params}) > 1:
        return None
    return call


def _unshare_counters(optimizer: Optimizer) -> None:
    """The optimizer itself counts up every tensor's counter."""
    for state in optimizer.state.values():
        if STEP in state:
            state[STEP] = state[STEP].clone()
