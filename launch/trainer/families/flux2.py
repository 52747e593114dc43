"""Flux 2: dev, and klein of 4B and 9B (diffusers ``Flux2Transformer2DModel``)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample
from launch.trainer.families.checks import Layout, refuse_key, refuse_pipeline
from launch.trainer.families.diffusion import Diffusion, tokens_of
from launch.trainer.families.latents import encode_image, from_tokens, to_tokens
from launch.trainer.objectives.sigma import BY_RESOLUTION, TIMESTEPS, Resolution

PROMPT_TOKENS = 512
"""Rows of a cached prompt. The network has no mask: the text encoder's output at padding is part of
what it was trained on, so that nothing is cut or zeroed."""
_TARGETS = (
    r".*\.(to_q|to_k|to_v|to_out\.0|to_qkv_mlp_proj)"
    # The single blocks' output projection. As a mere ending it would also match the list that the
    # double blocks call to_out, which PEFT cannot adapt.
    r"|single_transformer_blocks\.\d+\.attn\.to_out"
)


class Flux2(Diffusion):
    """What dev and klein share: one token per latent pixel, position ids on four axes, no masks."""

    class_name = "Flux2Transformer2DModel"
    defaults = {
        # 1.6 to 3.2 from 256 to 1024 pixels a side, the line that the Flux models' schedulers use
        # and that musubi-tuner recommends for training.
        "shift": BY_RESOLUTION,
        "resolution": Resolution(
            tokens_of=lambda shape: shape[-2] * shape[-1], tokens=(256, 4096), mu=(0.5, 1.15)
        ),
        # The pipelines' own for 50 steps at 1024 pixels.
        "sample_shift": round(math.exp(2.02), 1),
    }
    guidance: ClassVar[float | None]
    """What the network is told as its guidance; None: it does not ask."""

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and dev as klein or klein as dev; see ``Family.check_config``."""
        super().check_config(model_config)
        told = self.guidance is not None
        other = "flux_2_klein_4b or flux_2_klein_9b" if told else "flux_2_dev"
        step = f"set model_type to {other}, or give the other model"
        refuse_key(model_config, "guidance_embeds", told, step)

    def lora_targets(self, model_config: Mapping[str, Any]) -> str:
        """Return the attentions, the single blocks' fused matrices among them."""
        return _TARGETS

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        height, width = noisy.shape[-2:]
        prompt = batch[PROMPT_EMBEDS]
        guidance = None if self.guidance is None else torch.full_like(timestep, self.guidance)
        output: tuple[Tensor, ...] = model(
            hidden_states=to_tokens(noisy),
            # In [0, 1]: the network multiplies by 1000 itself.
            timestep=timestep / TIMESTEPS,
            guidance=guidance,
            encoder_hidden_states=prompt,
            txt_ids=_ids(1, 1, prompt.shape[1], noisy.device),
            img_ids=_ids(height, width, 1, noisy.device),
            return_dict=False,
        )
        return from_tokens(output[0], height, width)

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Latent pixels and the prompt; see ``Family.tokens``."""
        return tokens_of(sample, 1) + PROMPT_TOKENS

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: (PROMPT_TOKENS, model_config["joint_attention_dim"]),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Cut the mode into 2 x 2 patches and normalise them as the VAE's BatchNorm would."""
        vae = pipeline.vae
        patches = pixel_unshuffle(encode_image(vae, pixels), 2)
        # Buffers, and no entries of the config: they come with the VAE's weights.
        mean, variance = (
            buffer.to("cpu", torch.float32).view(-1, 1, 1)
            for buffer in (vae.bn.running_mean, vae.bn.running_var)
        )
        return {LATENTS: (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return 512 rows, those at padding as the text encoder gives them."""
        prompt, _ = pipeline.encode_prompt(caption, max_sequence_length=PROMPT_TOKENS)
        return {PROMPT_EMBEDS: prompt[0]}

    def pixel_size(self, pipeline: Any, latents: Tensor) -> dict[str, int]:
        """Height and width: a latent pixel is a patch of 2 x 2 of the VAE's."""
        scale = 2 * pipeline.vae_scale_factor
        return {"height": latents.shape[-2] * scale, "width": latents.shape[-1] * scale}


class Flux2Dev(Flux2):
    """Flux 2 dev: guidance-distilled, the guidance is an input of the network."""

    model_type = "flux_2_dev"
    pipeline_class = "Flux2Pipeline"
    # The target is the velocity of the data, which guidance does not strengthen.
    guidance = 1.0

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """Return prompt and embedded guidance; there is no negative prompt."""
        return {**self.pipeline_prompt(batch), self.guidance_argument: guidance}


class Flux2Klein(Flux2):
    """Flux 2 klein base: classifier-free guidance, nothing embedded."""

    pipeline_class = "Flux2KleinPipeline"
    guidance = None

    def model_folder(self, path: Path) -> Path:
        """Refuse also klein without base, whose network has the same config."""
        folder = super().model_folder(path)
        step = "this klein is distilled to few steps, which training undoes; use FLUX.2-klein-base"
        refuse_pipeline(folder, "is_distilled", (False, None), step)
        return folder


class Flux2Klein4B(Flux2Klein):
    """Klein with 4 billion parameters."""

    model_type = "flux_2_klein_4b"


class Flux2Klein9B(Flux2Klein):
    """Klein with 9 billion parameters: the same names, more blocks."""

    model_type = "flux_2_klein_9b"


def _ids(height: int, width: int, words: int, device: torch.device) -> Tensor:
    """Positions (N, 4) on the axes time, row, column and word, the last axis fastest."""
    axes = [torch.arange(size, device=device) for size in (1, height, width, words)]
    return torch.cartesian_prod(*axes)
