"""Stable Diffusion XL, base (diffusers ``UNet2DConditionModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample
from launch.trainer.families.alphas import NoiseDenoiser
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import Origin, tokens_of
from launch.trainer.families.sd15 import CLIP_TOKENS, STABLE_DIFFUSION, refuse_other_inputs

POOLED, TIME_IDS = "pooled", "time_ids"
"""Fields of a sample: the second text encoder's pooled output, and six numbers: original height
and width, top and left of the crop, height and width."""
_SIZES = 6
"""Numbers in ``time_ids``; the refiner has five."""


class SDXL(NoiseDenoiser):
    """Text to image; the network is told a pooled prompt and the picture's size and crop."""

    model_type = "sdxl"
    class_name = "UNet2DConditionModel"
    pipeline_class = "StableDiffusionXLPipeline"
    subfolder = "unet"
    betas = STABLE_DIFFUSION
    prompt_fields = (PROMPT_EMBEDS, POOLED)

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, other inputs, and the refiner; see ``Family.check_config``."""
        super().check_config(model_config)
        refuse_other_inputs(model_config)
        step = "this is no Stable Diffusion XL; set model_type to sd15"
        if model_config.get("addition_embed_type") is None:
            # A missing key is as telling as another value.
            model_config = {**model_config, "addition_embed_type": None}
        refuse_key(model_config, "addition_embed_type", "text_time", step)
        # The refiner has one text encoder, so that its pooled output is as wide as its rows, and
        # it is told an aesthetic score: five numbers.
        width = model_config["projection_class_embeddings_input_dim"]
        rows = model_config["cross_attention_dim"]
        if width == (_SIZES - 1) * model_config["addition_time_embed_dim"] + rows:
            raise ModelSourceError(
                f"model_path holds SDXL's refiner (projection_class_embeddings_input_dim={width},"
                f" cross_attention_dim={rows}). Only the base model is trained here."
            )

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            sample=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            added_cond_kwargs={"text_embeds": batch[POOLED], "time_ids": batch[TIME_IDS]},
            return_dict=False,
        )
        return output[0]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Latent pixels of the outermost blocks with attention: half the height and width."""
        return tokens_of(sample, 2)

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        sizes = _SIZES * model_config["addition_time_embed_dim"]
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: (CLIP_TOKENS, model_config["cross_attention_dim"]),
            POOLED: (model_config["projection_class_embeddings_input_dim"] - sizes,),
            TIME_IDS: (_SIZES,),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return latents, and the size of a picture that was neither scaled nor cropped."""
        height, width = (float(size) for size in pixels.shape[-2:])
        sizes = torch.tensor([height, width, 0.0, 0.0, height, width])
        return {**super().encode_pixels(pipeline, pixels), TIME_IDS: sizes}

    def encode_source(self, pipeline: Any, pixels: Tensor, origin: Origin) -> Mapping[str, Tensor]:
        """Return latents, and the file's own size and the crop; see ``Diffusion.encode_source``."""
        encoded = self.encode_pixels(pipeline, pixels)
        given = torch.tensor([*origin.size, *origin.corner], dtype=torch.float32)
        return {**encoded, TIME_IDS: torch.cat([given, encoded[TIME_IDS][4:]])}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows of both text encoders side by side, and the second one's pooled."""
        prompt, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        return {PROMPT_EMBEDS: prompt[0], POOLED: pooled[0]}

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """See ``Diffusion.pipeline_prompt``."""
        return {"prompt_embeds": batch[PROMPT_EMBEDS], "pooled_prompt_embeds": batch[POOLED]}
