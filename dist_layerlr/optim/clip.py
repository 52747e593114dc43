"""Clip by the norm over all ranks, by the sharder's own method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.timed import drop_held
from dist_layerlr.sharders import sharder_of


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most ``max_norm``. Collective.

    What a plan's timing holds has no part in it, as a parameter that needs no gradient has none.
    ``torch.nn.utils.clip_grad_norm_`` on an FSDP1 model uses each rank's own norm, silently; this
    does not.

    Args:
        model: plain, DDP, FSDP1 or FSDP2.
        max_norm: infinity measures without clipping.

    Returns:
        The norm before clipping.

    Raises:
        ConfigError: the model is a DeepSpeed engine, which clips inside its step.
    """
    sharder = sharder_of(model)
    layout = sharder.layout
    drop_held(model)
    if layout.engine_steps:
        raise ConfigError(
            "Invalid clip_grad_norm on a DeepSpeed engine: set 'gradient_clipping' in its config"
            " instead."
        )
    if layout.name in ("fsdp1", "fsdp1_flat"):
        # Ranks hold different elements of a flat shard: only FSDP1's own method sums over them.
        return float(model.clip_grad_norm_(max_norm))  # type: ignore[operator]
    # Gradients are on the sharded parameters, which the model shows only when no unit is gathered.
    sharder.reshard()
    return _clip([p for p in model.parameters() if p.grad is not None], max_norm)


def _clip(params: list[nn.Parameter], max_norm: float) -> float:
    """Clip by one norm over tensors and DTensors of several meshes.

    No single torch call takes them together: each mesh gives its own norm, whose square adds up.
    """
    meshes: dict[Any, list[nn.Parameter]] = {}
    for param in params:
        mesh = param.device_mesh if isinstance(param, DTensor) else None
        meshes.setdefault(mesh, []).append(param)
    norms = []
    for members in meshes.values():
        norm = torch.nn.utils.get_total_norm([_gradient(p) for p in members])
        # full_tensor sums over the mesh's ranks; a plain tensor is whole on every rank already.
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not norms:
        return 0.0
    total = torch.linalg.vector_norm(torch.stack(norms))
    for members in meshes.values():
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return float(total)


def _gradient(param: nn.Parameter) -> Tensor:
    """A gradient whose addends on several ranks (``Partial``) are summed, here and for the step.

    torch 2.10 scales such addends wrongly in place.
    """
    gradient = param.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(param, DTensor):
        if any(placement.is_partial() for placement in gradient.placements):
            gradient = param.grad = gradient.redistribute(placements=param.placements)
    return gradient
