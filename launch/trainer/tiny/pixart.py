"""Tiny parts of the PixArt-Sigma pipeline: network, VAE and scheduler."""

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
        network = diffusers.PixArtTransformer2DModel(
            sample_size=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            caption_channels=24,
            interpolation_scale=1,
            use_additional_conditions=False,
        )
        vae = image_vae(diffusers.AutoencoderKL, scaling_factor=1.5)
    # Every setting is the class's own, as it is shipped.
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"pixart": _parts}
