"""Tiny parts of the Sana pipeline: network, VAE and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TEXT = 24
"""Width of a prompt's rows."""


def parts(qk_norm: str | None = None) -> dict[str, Any]:
    """Make the components, weights from a seed of their own.

    Args:
        qk_norm: None in version 1.0, ``"rms_norm_across_heads"`` in 1.5.
    """
    import diffusers

    halves = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT,
            sample_size=8,
            qk_norm=qk_norm,
        )
        vae = diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            scaling_factor=0.4,
            **{f"encoder_{key}": value for key, value in halves.items()},
            **{f"decoder_{key}": value for key, value in halves.items()},
        )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"sana": parts}
