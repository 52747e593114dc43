"""One file per sharder; ``detect`` looks at the model to choose."""

from __future__ import annotations

from torch import nn

from dist_layerlr.adapters.base import Adapter, LiveParam, ReadBack

__all__ = ["Adapter", "LiveParam", "ReadBack", "detect"]


def detect(model: nn.Module) -> Adapter:
    """Choose the adapter by what wraps the model, never by a flag."""
    from dist_layerlr.adapters import fsdp2, plain, zero

    for adapter in (zero.ZeroAdapter(), fsdp2.Fsdp2Adapter(), plain.PlainAdapter()):
        if adapter.handles(model):
            return adapter
    raise AssertionError("PlainAdapter handles every module")
