"""Qwen-Image (diffusers ``QwenImageTransformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.checks import Layout, refuse_key, refuse_pipeline
from launch.trainer.families.diffusion import Diffusion, tokens_of
from launch.trainer.families.latents import from_patches, to_patches
from launch.trainer.objectives.sigma import TIMESTEPS, Resolution

_EDITS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Keys of the edit and layered variants' ``config.json``, true there."""
_LAST = ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")

PROMPT_TOKENS = 512
"""The most rows that the pipeline lets a prompt have, unless told otherwise."""


class Qwen(Diffusion):
    """Text to image: 2 x 2 patches, a video VAE used on one frame, prompts with a mask."""

    model_type = "qwen"
    class_name = "QwenImageTransformer2DModel"
    pipeline_class = "QwenImagePipeline"
    defaults = {
        # musubi-tuner's recommendation.
        "shift": 2.2,
        # The line of the shipped scheduler, for shift="resolution".
        "resolution": Resolution(
            tokens_of=lambda shape: shape[-2] * shape[-1] // 4, tokens=(256, 8192), mu=(0.5, 0.9)
        ),
        # The shipped scheduler's at 1024 pixels.
        "sample_shift": 2.0,
    }
    ragged = True
    guidance_argument = "true_cfg_scale"
    patch = 2

    def model_folder(self, path: Path) -> Path:
        """Refuse also Qwen-Image-Edit, whose first version's network has the same config."""
        folder = super().model_folder(path)
        step = "this is an edit or layered variant, which needs other inputs; use Qwen-Image"
        refuse_pipeline(folder, "_class_name", (self.pipeline_class,), step)
        return folder

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, edit, layered and distilled variants; see ``Family``."""
        super().check_config(model_config)
        for key in _EDITS:
            step = "this is an edit or layered variant, which needs other inputs; use Qwen-Image"
            refuse_key(model_config, key, False, step)
        step = "this is a guidance-distilled variant; use Qwen-Image"
        refuse_key(model_config, "guidance_embeds", False, step)

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what the last block does to its text stream, which nothing reads afterwards."""
        last = f"transformer_blocks.{model_config['num_layers'] - 1}"
        return tuple(f"{last}.{name}.{kind}" for name in _LAST for kind in ("weight", "bias"))

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        height, width = noisy.shape[-2:]
        output: tuple[Tensor, ...] = model(
            hidden_states=to_patches(noisy),
            # In [0, 1]: the network multiplies by 1000 itself.
            timestep=timestep / TIMESTEPS,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            encoder_hidden_states_mask=batch[PROMPT_MASK],
            # Only the first entry is read: one size for each batch.
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )
        return from_patches(output[0], height, width)

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches and the prompt; see ``Family.tokens``."""
        return tokens_of(sample, self.patch) + len(sample[PROMPT_EMBEDS])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"] // 4, "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["joint_attention_dim"]),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the mode of the VAE, normalised channel by channel."""
        vae = pipeline.vae
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        coded = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()
        return {LATENTS: (coded[0, :, 0].to("cpu", torch.float32) - mean) / std}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows behind the template's; see ``Diffusion.encode_prompt``."""
        # One prompt is not padded: there is nothing to mask. The pipeline's call takes fewer rows
        # than its encode_prompt returns, of cached prompts too.
        prompt, _ = pipeline.encode_prompt(caption, max_sequence_length=PROMPT_TOKENS)
        return {PROMPT_EMBEDS: prompt[0]}

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """See ``Diffusion.pipeline_prompt``."""
        return {"prompt_embeds": batch[PROMPT_EMBEDS], "prompt_embeds_mask": batch[PROMPT_MASK]}
