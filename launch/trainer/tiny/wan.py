"""Tiny pipelines of Wan: every kind of parameter name of the published networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Parts = dict[str, Any]
_WIDTH, _TEXT, _SEEN = 24, 16, 8
"""Of the blocks, of a prompt, and of what CLIP sees in the first frame."""
_HEADS = {"num_attention_heads": 2, "attention_head_dim": _WIDTH // 2}
_NETWORK = {**_HEADS, "text_dim": _TEXT, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
_IMAGE = {"in_channels": 12}
_CLIP = {"image_dim": _SEEN, "added_kv_proj_dim": _WIDTH}
_MEAN, _STD = (0.3, -0.5, 0.1, 0.8), (0.7, 1.4, 0.9, 2.0)
"""Of the latents. Not 0 and 1, so that a normalisation that is left out shows."""
_DENSE = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
"""The VAE of the 5B model, which takes squares of 2 x 2 pixels as channels."""


def _parts(shift: float, network: Parts | None = None, experts: int = 1, **more: Any) -> Parts:
    """Make the components of one pipeline but for its text encoder.

    Args:
        shift: Of the scheduler, as it is shipped.
        network: More arguments of the network.
        experts: Networks.
        more: Components and settings of the pipeline, or functions that make them.
    """
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    vae = more.pop("vae", {})
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    names = ("transformer", "transformer_2")[:experts]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # First, so that the VAE is the same whatever the network.
        parts = {"vae": _vae(**vae), "scheduler": UniPCMultistepScheduler(**flow)}
        kwargs = {**_NETWORK, "in_channels": 4, "out_channels": 4, **(network or {})}
        parts |= {name: WanTransformer3DModel(**kwargs) for name in names}
        for name, value in more.items():
            parts[name] = value() if callable(value) else value
    return parts


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKLWan

    statistics = {"latents_mean": list(_MEAN), "latents_std": list(_STD)}
    sizes = {"base_dim": 4, "z_dim": len(_MEAN), "dim_mult": [1] * 4, "num_res_blocks": 1}
    return AutoencoderKLWan(**sizes, **statistics, **{"is_residual": bool(more), **more})


def _image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"hidden_size": _SEEN, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    return CLIPVisionModel(CLIPVisionConfig(**heads, **sizes)).eval()


def _image_processor() -> Any:
    from transformers import CLIPImageProcessor

    size = {"height": 16, "width": 16}
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)


_SEES = {"image_encoder": _image_encoder, "image_processor": _image_processor}

PARTS: dict[str, Callable[[], Parts]] = {
    "wan": partial(_parts, 3.0),
    "wan_i2v": partial(_parts, 3.0, {**_IMAGE, **_CLIP}, 1, **_SEES),
    "wan22": partial(_parts, 3.0, experts=2, boundary_ratio=0.875),
    "wan22_i2v": partial(_parts, 3.0, experts=2, network=_IMAGE, boundary_ratio=0.9),
    "wan22_5b": partial(_parts, 5.0, vae=_DENSE, expand_timesteps=True),
}
"""Model type, or variant of one, -> the components of its pipeline but for the text encoder."""
PIPELINES = {
    "wan_i2v": "WanImageToVideoPipeline",
    "wan22_i2v": "WanImageToVideoPipeline",
    "wan22_5b": "WanPipeline",
}
"""Classes of the pipelines of variants that are not their family's own."""
