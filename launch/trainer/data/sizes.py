"""Aspect-ratio buckets: the size that each picture is scaled and cropped to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_layerlr import fields

_LONGEST = 2.0
"""Of a bucket: its longer side over that of a square of the same area. Ratios up to 4 : 1."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one picture is brought to its size: scaled to cover it, then cropped at the centre."""

    original: tuple[int, int]
    """Height and width of the file, as shown."""
    scaled: tuple[int, int]
    """Height and width before the crop."""
    corner: tuple[int, int]
    """Top and left of the crop, in the scaled picture."""
    size: tuple[int, int]
    """Height and width that the VAE sees."""

    @property
    def enlarged(self) -> bool:
        """Whether the file has fewer pixels than were asked for."""
        return self.scaled[0] > self.original[0]


def place(original: tuple[int, int], size: tuple[int, int]) -> Placement:
    """Scale a picture to cover a size, and cut off as much on one side as on the other."""
    factor = max(size[0] / original[0], size[1] / original[1])
    # At least the size itself: a rounding error must not leave a line uncovered.
    height, width = (max(size[i], round(original[i] * factor)) for i in (0, 1))
    return Placement(
        original=original,
        scaled=(height, width),
        corner=((height - size[0]) // 2, (width - size[1]) // 2),
        size=size,
    )


def bucket_sizes(pixels: int, step: int) -> list[tuple[int, int]]:
    """List the sizes of about ``pixels`` pixels, none larger, whose sides are multiples of a step.

    Raises:
        ConfigError: not even a square of one step fits.
    """
    if pixels < step * step:
        allowed = f"at least {step * step}, a square of one step"
        raise fields.invalid("--pixels", pixels, allowed)
    square = math.sqrt(pixels)
    shortest, longest = max(step, square / _LONGEST), square * _LONGEST
    heights = range(math.ceil(shortest / step) * step, int(longest) + 1, step)
    found = {(height, int(pixels / height) // step * step) for height in heights}
    kept = {size for size in found if min(size) >= shortest - step and min(size) > 0}
    # What a picture may be, it may be turned by a quarter.
    return sorted(kept | {(width, height) for height, width in kept})


def nearest(original: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size whose ratio of sides is nearest; of equal ones the largest."""
    wanted = math.log(original[0] / original[1])

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return round(abs(math.log(size[0] / size[1]) - wanted), 9), -size[0] * size[1]

    return min(sizes, key=distance)
