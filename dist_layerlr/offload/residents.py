"""Tensors that stay on the device: moved there in place, and back, with gradients and state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.errors import OffloadError


class Residents:
    """Tensors of a model that live on the device while it is streamed."""

    def __init__(self, device: torch.device, optimizer: Optimizer | None):
        self._device, self._optimizer = device, optimizer
        self._homes: dict[int, tuple[str, Tensor, torch.device]] = {}
        """{id: (name, tensor, first device)}. Holding the tensor keeps its id from being reused."""

    def adopt(self, model: nn.Module, streamed: set[int]) -> None:
        """Move all parameters and buffers to the device, but not the streamed ones.

        May be called again: adapters that were added since are moved, too.

        Args:
            model: the whole model.
            streamed: ids of streamed parameters.
        """
        named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in named:
            # One that was moved before keeps its first home, wherever it is now.
            known = id(tensor) in streamed or id(tensor) in self._homes
            if not known and tensor.device != self._device:
                self._homes[id(tensor)] = (name, tensor, tensor.device)
                move(tensor, self._device, self._optimizer)

    def check(self) -> None:
        """Refuse tensors that left the device.

        Raises:
            OffloadError: a tensor was moved; the message names it.
        """
        for name, tensor, _ in self._homes.values():
            if tensor.device != self._device:
                raise OffloadError(
                    f"Parameter or buffer {name} was moved to {tensor.device} after stream(). "
                    f"Move it back to {self._device}, or call handle.remove() first."
                )

    def release(self) -> None:
        """Move everything back to where it came from."""
        for _, tensor, home in self._homes.values():
            move(tensor, home, self._optimizer)
        self._homes.clear()


def move(
    tensor: Tensor, device: torch.device, optimizer: Optimizer | None, value: Tensor | None = None
) -> None:
    """Move a tensor in place, with its gradient and optimizer state.

    Args:
        tensor: keeps its identity.
        device: where to.
        optimizer: whose state follows, or None.
        value: the new data, if it is there already.
    """
    # torch refuses data on another device than the gradient's, so the gradient is taken off first.
    gradient, tensor.grad = tensor.grad, None
    tensor.data = tensor.data.to(device) if value is None else value
    if gradient is not None:
        tensor.grad = gradient.to(device)
    state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
    for key, held in state.items():
        # A step counter of no dimensions stays on the CPU, as torch keeps it, unless the step runs
        # on the device.
        if isinstance(held, Tensor) and (
            held.ndim or device.type == "cpu" or _counts_on_device(optimizer, tensor)
        ):
            state[key] = held.to(device)


def _counts_on_device(optimizer: Optimizer | None, tensor: Tensor) -> bool:
    groups = optimizer.param_groups if optimizer is not None else []
    for group in groups:
        # By identity: ``in`` would compare values.
        if any(param is tensor for param in group["params"]):
            return bool(group.get("fused") or group.get("capturable"))
    return False
