"""A tiny pipeline of HunyuanVideo 1.0: every kind of parameter name of the published network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _parts() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoTransformer3DModel,
    )

    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2}
    # A head is as wide as the three axes of the rotary positions together.
    heads = {"num_attention_heads": 2, "attention_head_dim": 12, "rope_axes_dim": (4, 4, 4)}
    text = {"text_embed_dim": 16, "pooled_projection_dim": 8}
    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "transformer": HunyuanVideoTransformer3DModel(
                in_channels=4, out_channels=4, **layers, **heads, **text
            ),
            "vae": AutoencoderKLHunyuanVideo(latent_channels=4, **sizes),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        }


PARTS: dict[str, Callable[[], dict[str, Any]]] = {"hunyuan_video": _parts}
"""Model type -> the components of its pipeline but for the text encoders."""
