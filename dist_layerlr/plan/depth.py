"""Depth factors: (block index, block count) -> a number in [min_factor, 1]. Pure arithmetic.

The seed's curves are fast at block 0 (``linear``, ``cosine``) or in the middle (``inverted_u``).
ViT layer decay is the opposite, slow at block 0, and needs layer ids rather than block indices: see
``layer_decay``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_layerlr import fields
from dist_layerlr.fields import setting
from dist_layerlr.plan.layer_decay import CONVENTIONS

DepthFunction = Callable[[float, "DepthSettings"], float]
"""x in [0, 1] (0 = first block, 1 = last) and the settings -> factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthSettings:
    """What shapes a depth curve; every field is dimensionless."""

    depth_strategy: str = setting(
        fields.one_of(lambda: (*DEPTH_FUNCTIONS, LAYER_DECAY)),
        default="linear",
        doc="The curve, section 3.",
    )
    depth_scope: str = setting(
        fields.one_of(lambda: ("stack", "trunk")),
        default="stack",
        doc="`stack`: depth restarts in every stack. `trunk`: one depth over the trunk's stacks in"
        " forward order.",
    )
    min_depth_factor: float | None = setting(
        fields.number(0.0, 1.0),
        default=None,
        shown="0.3; layer_decay: no floor",
        doc="The smallest factor.",
    )
    peak_position: float = setting(
        fields.number(0.0, 1.0), default=0.5, doc="Where `inverted_u` peaks; 0 is the first block."
    )
    layer_decay: float = setting(
        fields.number(0.0, 1.0, open_low=True),
        default=0.8,
        doc="Rate per layer of `layer_decay`.",
    )
    depth_table: tuple[float, ...] = setting(
        fields.numbers(at_least=2),
        default=(),
        doc="Factors of `table`, first block first; interpolated linearly when their number is not"
        " the block count.",
    )
    convention: str = setting(
        fields.one_of(lambda: tuple(CONVENTIONS)),
        default="seed",
        doc="How `layer_decay` numbers layers, section 7.",
    )
    num_layers: int | None = setting(
        fields.integer(1),
        default=None,
        shown="the block count",
        doc="L of `layer_decay`; not below the block count.",
    )

    @property
    def floor(self) -> float:
        """The effective minimum of a curve (layer decay has none unless it is given)."""
        return 0.3 if self.min_depth_factor is None else self.min_depth_factor


def linear(x: float, s: DepthSettings) -> float:
    """1.0 at the first block (fast), min_depth_factor at the last (slow)."""
    # max and min keep a rounding from leaving [min_depth_factor, 1].
    return max(s.floor, 1.0 - x * (1.0 - s.floor))


def cosine(x: float, s: DepthSettings) -> float:
    """1.0 at the first block (fast), min_depth_factor at the last (slow), flat at both ends."""
    return min(1.0, s.floor + (1.0 - s.floor) * 0.5 * (1.0 + math.cos(math.pi * x)))


def inverted_u(x: float, s: DepthSettings) -> float:
    """1.0 at peak_position (fast), min_depth_factor at both ends: a parabola on either side."""
    peak = s.peak_position
    # A peak at an end has no side there to divide by.
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
    """Make ``"depth_strategy": name`` available.

    ``register_depth("step", lambda x, s: 1.0 if x < 0.5 else s.floor)``

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
    # Interpolation would return the given numbers up to a rounding; here they are exact.
    if settings.depth_strategy == "table" and len(settings.depth_table) == blocks:
        return settings.depth_table[block]
    if blocks <= 1:
        return 1.0
    return DEPTH_FUNCTIONS[settings.depth_strategy](block / (blocks - 1), settings)


def interpolate(values: Sequence[float], x: float) -> float:
    """Linear interpolation of evenly spaced ``values`` at x in [0, 1]."""
    position = x * (len(values) - 1)
    # At x = 1 the last interval is taken, where share is 1.
    left = min(int(position), len(values) - 2)
    share = position - left
    return values[left] * (1.0 - share) + values[left + 1] * share
