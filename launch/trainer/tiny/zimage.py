"""Tiny parts of the Z-Image pipeline: network, VAE and scheduler."""

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
        network = diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=3,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[4, 6, 6],
            # Positions: the text's, padded to a multiple of 32, then the image's rows and columns.
            axes_lens=[1024, 64, 64],
        )
        # As new they are 0 for any input, and would hide what pads a sample.
        torch.nn.init.normal_(network.x_pad_token)
        torch.nn.init.normal_(network.cap_pad_token)
        vae = image_vae(diffusers.AutoencoderKL, scaling_factor=1.5, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return {"transformer": network, "vae": vae, "scheduler": scheduler}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"zimage": parts}
