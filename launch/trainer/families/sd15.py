"""Stable Diffusion 1.5 and 2 (diffusers ``UNet2DConditionModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample
from launch.trainer.families.alphas import NoiseDenoiser
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import tokens_of

CLIP_TOKENS = 77
"""Rows of a cached prompt: CLIP's own length, and there is no mask."""
STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""The betas of Stable Diffusion 1, 2 and XL."""


class SD15(NoiseDenoiser):
    """Text to image, 77 tokens, no other condition. The same class holds Stable Diffusion 2."""

    model_type = "sd15"
    class_name = "UNet2DConditionModel"
    pipeline_class = "StableDiffusionPipeline"
    subfolder = "unet"
    betas = STABLE_DIFFUSION

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and UNets that take other inputs; see ``Family.check_config``."""
        super().check_config(model_config)
        refuse_other_inputs(model_config)
        step = "this is Stable Diffusion XL; set model_type to sdxl"
        refuse_key(model_config, "addition_embed_type", None, step)

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            sample=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            return_dict=False,
        )
        return output[0]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Latent pixels: the length of the outermost blocks' sequences."""
        return tokens_of(sample, 1)

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: (CLIP_TOKENS, model_config["cross_attention_dim"]),
        }

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return CLIP's 77 rows, those at padding as it gives them."""
        prompt, _ = pipeline.encode_prompt(caption, pipeline.device, 1, False)
        return {PROMPT_EMBEDS: prompt[0]}


def refuse_other_inputs(model_config: Mapping[str, Any]) -> None:
    """Refuse UNets of other tasks, which share the class.

    Raises:
        ModelSourceError: inpainting and depth, upscaling, or a distilled model.
    """
    step = "it also takes a mask, a depth map or a picture; use a text-to-image model"
    refuse_key(model_config, "in_channels", model_config.get("out_channels", 4), step)
    step = "an upscaler is told a noise level; use a text-to-image model"
    for key in ("class_embed_type", "num_class_embeds"):
        refuse_key(model_config, key, None, step)
    step = "a distilled model (LCM) is told its guidance; use the model that it was made from"
    refuse_key(model_config, "time_cond_proj_dim", None, step)
