"""Tiny pipelines of LTX-2.0, 2.3 and 2.5: video, sound, connectors and vocoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Parts = dict[str, Any]
_VIDEO, _AUDIO, _TEXT, _STATES = 24, 16, 16, 3
"""Widths of the two streams and of the text encoder, and how many of its states are taken."""
_STREAMS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": _VIDEO // 2,
    "cross_attention_dim": _VIDEO,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": _AUDIO // 2,
    "audio_cross_attention_dim": _AUDIO,
    "num_layers": 2,
    "caption_channels": _TEXT,
    # The class's own default is that of no published model.
    "rope_type": "split",
    # Those of the VAE below.
    "vae_scale_factors": (4, 16, 16),
}
V2_3 = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
    "use_prompt_embeddings": False,
}
V2_5 = {**V2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
"""How the networks of the later versions differ from that of 2.0."""


def _parts(version: Parts) -> Parts:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTX2VideoTransformer3DModel

    shifts = {"base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    lengths = {"base_image_seq_len": 1024, "max_image_seq_len": 4096}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            **_codecs(),
            "connectors": _connectors(later=bool(version)),
            "transformer": LTX2VideoTransformer3DModel(**_STREAMS, **version),
            "scheduler": FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, **shifts, **lengths
            ),
        }


def _codecs() -> Parts:
    """Make the two VAEs, whose statistics are not the identity, and the vocoder."""
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    # 16 pixels and 4 frames become one, in two halvings behind patches of 4 x 4.
    halves = ("spatiotemporal",) * 2
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        downsample_type=halves,
        upsample_type=halves,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        scaling_factor=0.8,
    )
    # 4 x 2 = base_channels: of a packed latent, whose statistics have as many numbers.
    mel = {"latent_channels": 2, "mel_bins": 8, "resolution": 32}
    audio = AutoencoderKLLTX2Audio(base_channels=4, ch_mult=(1,) * 3, num_res_blocks=1, **mel)
    for codec in (vae, audio):
        codec.latents_mean.copy_(torch.tensor([0.3, -0.5, 0.1, 0.8]))
        codec.latents_std.copy_(torch.tensor([0.7, 1.4, 0.9, 2.0]))
    sizes = {"in_channels": 16, "hidden_channels": 8, "upsample_kernel_sizes": [4]}
    resnets = {"resnet_kernel_sizes": [3], "resnet_dilations": [[1]]}
    vocoder = LTX2Vocoder(**sizes, upsample_factors=[2], **resnets)
    return {"vae": vae, "audio_vae": audio, "vocoder": vocoder}


def _connectors(*, later: bool) -> Any:
    """Make what brings the text encoder's states to both streams; ``later``: since 2.3."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_learnable_registers": 4}
    each = {f"{stream}_connector_{k}": v for stream in ("video", "audio") for k, v in heads.items()}
    each["video_connector_attention_head_dim"] = _VIDEO // 2 if later else _TEXT // 2
    gates = dict.fromkeys(("per_modality_projections", "proj_bias"), later)
    gates |= dict.fromkeys(("video_gated_attn", "audio_gated_attn"), later)
    return LTX2TextConnectors(
        caption_channels=_TEXT,
        text_proj_in_factor=_STATES,
        rope_type="split",
        connector_rope_base_seq_len=32,
        video_hidden_dim=_VIDEO,
        audio_hidden_dim=_AUDIO,
        **gates,
        **each,
    )


PARTS: dict[str, Callable[[], Parts]] = {
    "ltx2": partial(_parts, {}),
    "ltx2_3": partial(_parts, V2_3),
    "ltx2_5": partial(_parts, V2_5),
}
"""Model type, or version of it -> the components of its pipeline but for the text encoder."""
PIPELINES = {"ltx2_3": "LTX2Pipeline", "ltx2_5": "LTX2Pipeline"}
"""Classes of the pipelines of versions."""
