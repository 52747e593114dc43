"""What the families of clips share."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, Sample
from launch.trainer.families.checks import misfit


def clip_size(latents: Tensor, space: int, time: int) -> dict[str, int]:
    """Height, width and frames of pixels, as pipelines take them.

    Args:
        latents: Of one sample, (C, F, H, W).
        space: Pixels per latent along height and width.
        time: Frames per latent frame; the first latent frame stands for one frame.
    """
    frames, height, width = latents.shape[-3:]
    return {
        "height": height * space,
        "width": width * space,
        "num_frames": (frames - 1) * time + 1,
    }


def frame_image(pixels: Tensor) -> Any:
    """Return one frame (3, H, W) in [-1, 1] as the PIL image that pipelines take."""
    from PIL import Image

    levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def one_length(samples: Sequence[Sample], name: str, step: str) -> None:
    """Refuse samples whose sequences ``name`` differ in length.

    Raises:
        ModelSourceError: names the field, the lengths and ``step``, what the user should do.
    """
    lengths = sorted({len(one[name]) for one in samples})
    if len(lengths) > 1:
        raise ModelSourceError(
            f"Samples of one batch hold {name} of {', '.join(map(str, lengths))} rows, and this"
            f" model has no mask for them: {step}, or set train.micro_batch=1."
        )


def tiles(shape: Sequence[int], patch: Sequence[int]) -> int:
    """Patches of latents (C, F, H, W)."""
    return prod(size // step for size, step in zip(shape[1:], patch, strict=True))


def check_tiles(shape: tuple[int, ...], patch: Sequence[int], label: str) -> None:
    """Refuse latents (C, F, H, W) that patches do not tile.

    Raises:
        ModelSourceError: label, shape found and shape needed.
    """
    if any(size % step for size, step in zip(shape[1:], patch, strict=True)):
        needed = f"(C, F, H, W) with F, H, W multiples of {tuple(patch)}"
        raise misfit(label, LATENTS, shape, needed, "crop the clips")
