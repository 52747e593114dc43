"""One file per sharder; ``detect`` looks at the model to choose."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from dist_layerlr.adapters.base import Adapter, LiveParam, Piece, Pieces, StatePiece, Weight

__all__ = ["Adapter", "LiveParam", "Piece", "Pieces", "StatePiece", "Weight", "detect", "true_weights"]


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


def true_weights(model: nn.Module) -> list[Weight]:
    """``Adapter.weights`` with ZeRO's fp32 masters, where it keeps any, in place of what is made from them.

    A name may have several runs on one rank, or an empty one.
    """
    from dist_layerlr.adapters.zero import ZeroAdapter

    adapter = detect(model)
    weights = adapter.weights(model)
    if not isinstance(adapter, ZeroAdapter):
        return weights
    masters: dict[str, list[Piece]] = {}
    for piece in adapter.pieces(model).pieces:
        masters.setdefault(piece.name, []).append(piece)
    return [true for weight in weights for true in _masters(weight, masters.get(weight.name, []))]


def _masters(weight: Weight, pieces: list[Piece]) -> list[Weight]:
    if not pieces:
        return [weight]
    return [replace(weight, tensor=p.of(p.owner), home=None, start=p.start, replicas=p.replicas) for p in pieces]
