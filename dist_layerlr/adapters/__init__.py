"""One file per sharder; ``detect`` looks at the model to choose."""

from __future__ import annotations

from torch import nn

from dist_layerlr.adapters.base import Adapter, LiveParam, Piece, Pieces, StatePiece, Weight

__all__ = ["Adapter", "LiveParam", "Piece", "Pieces", "StatePiece", "Weight", "detect"]


def detect(model: nn.Module) -> Adapter:
    """Choose the adapter by what wraps the model, never by a flag."""
    from dist_layerlr.adapters import fsdp1, fsdp2, plain, zero

    adapters: tuple[Adapter, ...] = (
        zero.ZeroAdapter(),
        fsdp2.Fsdp2Adapter(),
        fsdp1.Fsdp1Adapter(),
        plain.PlainAdapter(),
    )
    for adapter in adapters:
        if adapter.handles(model):
            return adapter
    raise AssertionError("PlainAdapter handles every module")
