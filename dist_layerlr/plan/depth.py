"""Depth factors: (block index, block count) -> a number in [min_factor, 1]. Pure arithmetic.

The seed's curves are fast at block 0 (``linear``, ``cosine``) or in the middle (``inverted_u``).
ViT layer decay is the opposite, slow at block 0, and needs layer ids rather than block indices: see
``layer_decay``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DepthFunction = Callable[[float, "DepthSettings"], float]
"""x in [0, 1] (0 = first block, 1 = last) and the settings -> factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthSettings:
    """What shapes a depth curve; every field is dimensionless."""

    depth_strategy: str = "linear"
    """Name of a curve in ``DEPTH_FUNCTIONS``, or ``layer_decay``."""
    depth_scope: str = "stack"
    """`stack`: depth restarts in every stack. `trunk`: one depth over the trunk's stacks in forward
    order."""
    min_depth_factor: float | None = None
    """Smallest factor, 0..1. None: 0.3 for the curves, no floor for layer_decay."""
    peak_position: float = 0.5
    """Where ``inverted_u`` peaks, 0..1."""
    layer_decay: float = 0.8
    """Rate of ``layer_decay``, (0, 1]."""
    depth_table: tuple[float, ...] = ()
    """Factors of ``table``, first block first; interpolated linearly when their number is not the
    block count."""
    convention: str = "seed"
    """How ``layer_decay`` numbers layers: a key of ``layer_decay.CONVENTIONS``."""
    num_layers: int | None = None
    """L of ``layer_decay``; None: the block count."""

    @property
    def floor(self) -> float:
        """The effective minimum of a curve."""
        return 0.3 if self.min_depth_factor is None else self.min_depth_factor


def linear(x: float, s: DepthSettings) -> float:
    """1.0 at the first block (fast), min_depth_factor at the last (slow)."""
    return max(s.floor, 1.0 - x * (1.0 - s.floor))


def cosine(x: float, s: DepthSettings) -> float:
    """1.0 at the first block (fast), min_depth_factor at the last (slow), flat at both ends."""
    return min(1.0, s.floor + (1.0 - s.floor) * 0.5 * (1.0 + math.cos(math.pi * x)))


def inverted_u(x: float, s: DepthSettings) -> float:
    """1.0 at peak_position (fast), min_depth_factor at both ends (slow): a parabola on either side
    of the peak.
    """
    peak = s.peak_position
    if x == peak:
        distance = 0.0
    else:
        distance = (peak - x) / peak if x < peak else (x - peak) / (1.0 - peak)
    return min(1.0, s.floor + (1.0 - s.floor) * (1.0 - distance * distance))


def flat(x: float, s: DepthSettings) -> float:
    """1.0 everywhere."""
    return 1.0


def table(x: float, s: DepthSettings) -> float:
    """The given factors, first block first, interpolated linearly between neighbours."""
    return interpolate(s.depth_table, x)


DEPTH_FUNCTIONS: dict[str, DepthFunction] = {
    "linear": linear,
    "cosine": cosine,
    "inverted_u": inverted_u,
    "flat": flat,
    "table": table,
}
LAYER_DECAY = "layer_decay"


def register_depth(name: str, function: DepthFunction) -> None:
    """Make ``"depth_strategy": name`` available: ``register_depth("step", lambda x, s: 1.0 if x <
    0.5 else s.floor)``.

    Raises:
        ValueError: the name is already taken.
    """
    if name in DEPTH_FUNCTIONS or name == LAYER_DECAY:
        raise ValueError(f"Invalid depth strategy name {name!r}: it is taken. Choose another name.")
    DEPTH_FUNCTIONS[name] = function


def depth_factor(block: int, blocks: int, settings: DepthSettings) -> float:
    """Evaluate the curve at ``x = block / (blocks - 1)``. A single block has factor 1.0.

    No rounding leaves [min_depth_factor, 1].
    """
    if settings.depth_strategy == "table" and len(settings.depth_table) == blocks:
        return settings.depth_table[block]
    if blocks <= 1:
        return 1.0
    return DEPTH_FUNCTIONS[settings.depth_strategy](block / (blocks - 1), settings)


def interpolate(values: Sequence[float], x: float) -> float:
    """Linear interpolation of evenly spaced ``values`` at x in [0, 1]."""
    position = x * (len(values) - 1)
    left = min(int(position), len(values) - 2)
    share = position - left
    return values[left] * (1.0 - share) + values[left + 1] * share
