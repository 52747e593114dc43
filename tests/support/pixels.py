"""Pictures and clips of random colour fields, in sizes that the tiny pipelines take."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]
"""Frames, height, width."""
_IMAGES: tuple[Size, Size] = ((1, 32, 64), (1, 64, 32))
_CLIPS: tuple[Size, Size] = ((5, 32, 64), (9, 32, 32))
_VIDEO = ("wan", "wan22", "hunyuan_video", "ltx2")


def sizes_of(model_type: str) -> tuple[Size, Size]:
    """Two sizes for a family."""
    return _CLIPS if model_type in _VIDEO else _IMAGES


def clip_of(seed: int, frames: int, height: int, width: int) -> Tensor:
    """(3, F, H, W) in [-1, 1]: smooth, so that a VAE has something to encode."""
    coarse = torch.rand(1, 3, frames, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    size = (frames, height, width)
    return nn.functional.interpolate(coarse, size, mode="trilinear")[0].clamp(-1, 1)
