"""Tiny parts of the Stable Diffusion 3.5 pipeline: network, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launch.trainer.tiny.vaes import image_vae

TEXT, POOLED = 24, 10
"""Width of a prompt's rows, and of its pooled vector."""


def parts(dual_attention_layers: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Make the components, weights from a seed of their own.

    Args:
        dual_attention_layers: Blocks with a second attention, as in medium; large has none.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.SD3Transformer2DModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=16,
            pooled_projection_dim=POOLED,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=dual_attention_layers,
        )
        vae = image_vae(diffusers.AutoencoderKL, scaling_factor=1.5, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"sd35": parts}
