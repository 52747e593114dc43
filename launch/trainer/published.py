"""The networks of the published checkpoints, by model type: what their ``config.json`` says.

They tell the size of a run before anything is downloaded (``launch/train.py --estimate``). Where a
class's own defaults are the published network, nothing stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_layerlr.errors import ModelSourceError


@dataclass(frozen=True, kw_only=True)
class Published:
    """One checkpoint."""

    name: str
    """As its publisher calls it."""
    class_name: str
    """Of the network, in diffusers; empty: ``config`` names it as another library does."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class that differ from its defaults."""
    sizes: Mapping[str, int]
    """Size along each lettered axis of a sample, as the family's ``layout`` names it."""
    sample: str
    """What such a sample is."""


def _latent(side: int, **more: int) -> dict[str, int]:
    return {"H": side, "W": side, **more}


_FLUX2 = "Flux2Transformer2DModel"
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD35 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "dual_attention_layers": tuple(range(13)),
}
_PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
_IMAGE = "1024 x 1024 px"
_CLIP = {"F": 21, "H": 60, "W": 104, "L": 512}
PUBLISHED = {
    "flux_2_dev": Published(
        name="FLUX.2-dev",
        class_name=_FLUX2,
        sizes=_latent(64, L=512),
        sample=_IMAGE,
    ),
    "flux_2_klein_4b": Published(
        name="FLUX.2-klein-base-4B",
        class_name=_FLUX2,
        config={
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        sizes=_latent(64, L=512),
        sample=_IMAGE,
    ),
    "flux_2_klein_9b": Published(
        name="FLUX.2-klein-base-9B",
        class_name=_FLUX2,
        config={
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
        sizes=_latent(64, L=512),
        sample=_IMAGE,
    ),
    "rfdetr": Published(
        name="RF-DETR Nano",
        class_name="",
        config={"model_name": "RFDETRNano"},
        sizes={"R": 384},
        sample="384 x 384 px",
    ),
    "sd15": Published(
        name="stable-diffusion-v1-5",
        class_name="UNet2DConditionModel",
        config={"sample_size": 64, "cross_attention_dim": 768},
        sizes=_latent(64, L=77),
        sample="512 x 512 px",
    ),
    "sdxl": Published(
        name="stable-diffusion-xl-base-1.0",
        class_name="UNet2DConditionModel",
        config=_SDXL,
        sizes=_latent(128, L=77),
        sample=_IMAGE,
    ),
    "sd35": Published(
        name="stable-diffusion-3.5-medium",
        class_name="SD3Transformer2DModel",
        config=_SD35,
        sizes=_latent(128, L=333),
        sample=_IMAGE,
    ),
    "qwen": Published(
        name="Qwen-Image",
        class_name="QwenImageTransformer2DModel",
        sizes=_latent(128, L=256),
        sample=_IMAGE,
    ),
    "zimage": Published(
        name="Z-Image",
        class_name="ZImageTransformer2DModel",
        config={"axes_lens": (1536, 512, 512)},
        sizes=_latent(128, L=256),
        sample=_IMAGE,
    ),
    "chroma_1": Published(
        name="Chroma1-HD",
        class_name="ChromaTransformer2DModel",
        sizes=_latent(128, L=256),
        sample=_IMAGE,
    ),
    "pixart": Published(
        name="PixArt-Sigma-XL-2-1024-MS",
        class_name="PixArtTransformer2DModel",
        config=_PIXART,
        sizes=_latent(128, L=300),
        sample=_IMAGE,
    ),
    "sana": Published(
        name="Sana_1600M_1024px",
        class_name="SanaTransformer2DModel",
        sizes=_latent(32, L=300),
        sample=_IMAGE,
    ),
    "llm": Published(
        name="Qwen3-8B",
        class_name="",
        config=_QWEN3_8B,
        sizes={"L": 2048},
        sample="2048 tokens",
    ),
    "ltx2": Published(
        name="LTX-2",
        class_name="LTX2VideoTransformer3DModel",
        config={"rope_type": "split"},
        sizes={"F": 16, "H": 16, "W": 24, "L": 1024, "A": 126},
        sample="121 frames of 768 x 512 px",
    ),
    "vit": Published(
        name="vit_base_patch16_224 of timm",
        class_name="",
        config={"architecture": "vit_base_patch16_224", "num_classes": 1000},
        sizes={"H": 224, "W": 224},
        sample="224 x 224 px",
    ),
    "wan": Published(
        name="Wan2.1-T2V-14B",
        class_name="WanTransformer3DModel",
        sizes=_CLIP,
        sample="81 frames of 832 x 480 px",
    ),
    "wan22": Published(
        name="Wan2.2-T2V-A14B, one expert",
        class_name="WanTransformer3DModel",
        sizes=_CLIP,
        sample="81 frames of 832 x 480 px",
    ),
    "hunyuan_video": Published(
        name="HunyuanVideo",
        class_name="HunyuanVideoTransformer3DModel",
        sizes={"F": 17, "H": 68, "W": 120, "L": 256},
        sample="65 frames of 960 x 544 px",
    ),
}


def published_config(model_type: str) -> dict[str, Any]:
    """Return the ``config.json`` of the published checkpoint of a model type.

    Raises:
        ModelSourceError: none is known.
    """
    known = PUBLISHED.get(model_type)
    if known is None:
        raise ModelSourceError(
            f"model_path is missing, and no published config of model_type={model_type!r} is known"
            f" here (known: {', '.join(sorted(PUBLISHED))}). Give model_path."
        )
    named = {"_class_name": known.class_name} if known.class_name else {}
    return {**named, **known.config}
