"""Latents of images: encoded by the pipeline's VAE, and laid out as tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def encode_image(vae: Any, pixels: Tensor) -> Tensor:
    """Encode (3, 1, H, W) in [-1, 1] to the mode of an image VAE: (C, h, w), float32 on the CPU.

    The mode and not a sample: a cache must not depend on a random draw.
    """
    coded = vae.encode(pixels.transpose(0, 1).to(vae.device, vae.dtype))
    # AutoencoderDC has no distribution.
    latents: Tensor = coded.latent if hasattr(coded, "latent") else coded.latent_dist.mode()
    return latents[0].to("cpu", torch.float32)


def shifted_and_scaled(vae: Any, raw: Tensor) -> Tensor:
    """Normalise by the two numbers of an ``AutoencoderKL``'s config."""
    scaled: Tensor = (raw - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    return scaled


def to_tokens(latents: Tensor) -> Tensor:
    """Lay out (B, C, H, W) as (B, H * W, C), row by row."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Invert ``to_tokens``."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def to_patches(latents: Tensor) -> Tensor:
    """Lay out (B, C, H, W) as tokens of 2 x 2 pixels, (B, H / 2 * W / 2, 4 C).

    Inside a token the order is channel, row, column, as in the pipelines that came from Flux 1.
    """
    return to_tokens(pixel_unshuffle(latents, 2))


def from_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """Invert ``to_patches``; height and width are those of the latents."""
    return pixel_shuffle(from_tokens(patches, height // 2, width // 2), 2)
