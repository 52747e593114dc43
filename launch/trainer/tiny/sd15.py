"""Tiny parts of the Stable Diffusion 1.5 pipeline: network, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launch.trainer.tiny.vaes import image_vae


def _parts() -> dict[str, Any]:
    """Make the components, weights from a seed of their own."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.UNet2DConditionModel(
            sample_size=16,
            layers_per_block=1,
            block_out_channels=(8, 16, 24, 24),
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=2,
        )
        vae = image_vae(diffusers.AutoencoderKL, scaling_factor=1.5)
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    return {"unet": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"sd15": _parts}
