"""Tiny parts of the Chroma pipeline: network, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launch.trainer.tiny.vaes import image_vae

TEXT = 24
"""Width of a prompt's rows."""


def parts() -> dict[str, Any]:
    """Make the components, weights from a seed of their own."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=2,
        )
        vae = image_vae(diffusers.AutoencoderKL, scaling_factor=1.5, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"chroma_1": parts}
