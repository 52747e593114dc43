"""Tiny parts of the Qwen-Image pipeline: network, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TEXT = 24
"""Width of a prompt's rows."""


def parts() -> dict[str, Any]:
    """Make the components, weights from a seed of their own."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 6, 6),
        )
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[2.0, 0.5, 1.5, 1.0],
        )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"qwen": parts}
