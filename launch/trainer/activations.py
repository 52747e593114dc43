"""What a forward pass keeps for its backward, counted on the meta device: nothing is computed.

Autograd says which tensors it saves, and their storages are added up, each once, weights left out.
Attention counts as a fused kernel does: it keeps queries, keys, values, the output and one float32
per row of scores, and no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(kw_only=True)
class Saved:
    """Bytes that a forward pass keeps."""

    total: int = 0
    by_block: dict[int, int] = field(default_factory=dict)
    """Index in the list of blocks -> bytes that were saved while the block ran."""

    @property
    def largest_block(self) -> int:
        """Bytes of the block that keeps most, which recomputation brings back one at a time."""
        return max(self.by_block.values(), default=0)


def count_saved(
    forward: Callable[[], object], parameters: Iterable[nn.Parameter], blocks: Sequence[nn.Module]
) -> Saved:
    """Run a forward pass on the meta device and count what autograd saves.

    Args:
        forward: Runs it; its model and its inputs are on the meta device.
        parameters: Weights, which are kept anyway.
        blocks: Modules whose share is told apart.
    """
    weights = {_key(parameter) for parameter in parameters}
    seen: dict[int, Any] = {}
    saved, running = Saved(), _Running()

    def keep(tensor: Tensor) -> Tensor:
        key = _key(tensor)
        if key not in weights and key not in seen:
            # The storage itself is kept: a freed one's address would be used again.
            storage = tensor.untyped_storage()
            seen[key] = storage
            saved.total += storage.nbytes()
            if running.block is not None:
                spent = saved.by_block.get(running.block, 0)
                saved.by_block[running.block] = spent + storage.nbytes()
        return tensor

    handles = [handle for i, block in enumerate(blocks) for handle in running.watch(block, i)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept), _FusedAttention():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return saved


class _Running:
    """Which block runs now."""

    def __init__(self) -> None:
        self.block: int | None = None

    def watch(self, block: nn.Module, index: int) -> list[Any]:
        def begin(*_: Any) -> None:
            self.block = index

        def end(*_: Any) -> None:
            self.block = None

        return [block.register_forward_pre_hook(begin), block.register_forward_hook(end)]


def _key(tensor: Tensor) -> int:
    # Meta storages have no address of their own (data_ptr is 0), so the storage object tells.
    return int(tensor.untyped_storage()._cdata)


class _FusedAttention(TorchFunctionMode):
    """Counts attention as a fused kernel: on meta, torch would take the one that keeps scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            apply: Any = _Attention.apply
            return apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes of a fused attention: (B, H, T, D) queries, (B, H, S, D) keys and values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        normaliser = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normaliser)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
