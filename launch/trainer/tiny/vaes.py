"""Tiny image VAEs: half the height and width, 4 channels."""

from __future__ import annotations

from typing import Any


def image_vae(cls: Any, **settings: Any) -> Any:
    """Make an ``AutoencoderKL`` or a class with its arguments; weights from the global generator.

    Args:
        cls: The class.
        settings: More of its arguments: how latents are normalised.
    """
    return cls(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **settings,
    )
