"""Tiny parts of the Flux 2 pipelines: network, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from launch.trainer.tiny.vaes import image_vae

TEXT = 24
"""Width of a prompt's rows: three layers of the text encoder side by side."""


def _parts(guidance_embeds: bool) -> dict[str, Any]:
    """Make the components, weights from a seed of their own."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        )
        vae = image_vae(diffusers.AutoencoderKLFlux2)
        # Latents are normalised by these buffers: new ones, 0 and 1, would hide a mistake.
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "flux_2_dev": partial(_parts, guidance_embeds=True),
    "flux_2_klein_4b": partial(_parts, guidance_embeds=False),
    "flux_2_klein_9b": partial(_parts, guidance_embeds=False),
}
