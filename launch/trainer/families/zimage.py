"""Z-Image (diffusers ``ZImageTransformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import Diffusion, tokens_of
from launch.trainer.families.latents import encode_image, shifted_and_scaled
from launch.trainer.objectives.sigma import TIMESTEPS

_MULTIPLE = 32
"""The network pads the tokens of the text and of the image, each to a multiple of this."""


class ZImage(Diffusion):
    """Takes lists of samples, counts time from noise to data, and returns the velocity negated."""

    model_type = "zimage"
    class_name = "ZImageTransformer2DModel"
    pipeline_class = "ZImagePipeline"
    # SimpleTuner's and ai-toolkit's in training; the base model's own scheduler in sampling.
    defaults = {"shift": 3.0, "sample_shift": 6.0}
    ragged = True
    patch = 2

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and the Omni variant; see ``Family.check_config``."""
        super().check_config(model_config)
        step = "this is Z-Image-Omni, which needs images as a condition; use Z-Image"
        refuse_key(model_config, "siglip_feat_dim", None, step)

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[list[Tensor], ...] = model(
            x=list(noisy.unsqueeze(2)),
            # 0 is noise and 1 is data.
            t=1 - timestep / TIMESTEPS,
            cap_feats=_prompts(batch),
            return_dict=False,
        )
        # The network's output points from noise to data.
        return -torch.stack(output[0]).squeeze(2)

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches and the prompt, each padded; see ``Family.tokens``."""
        counts = (tokens_of(sample, self.patch), len(sample[PROMPT_EMBEDS]))
        return sum(-(-count // _MULTIPLE) * _MULTIPLE for count in counts)

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["cap_feat_dim"]),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE; see ``Diffusion.encode_pixels``."""
        return {LATENTS: shifted_and_scaled(pipeline.vae, encode_image(pipeline.vae, pixels))}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows of the prompt alone; see ``Diffusion.encode_prompt``."""
        prompts, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        return {PROMPT_EMBEDS: prompts[0]}

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """See ``Diffusion.pipeline_prompt``."""
        return {"prompt_embeds": _prompts(batch)}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """See ``Diffusion.pipeline_inputs``."""
        # The pipeline counts from 0: prompt + scale * (prompt - negative).
        scale = {"guidance_scale": max(guidance - 1, 0.0)}
        return {**super().pipeline_inputs(batch, guidance), **scale}


def _prompts(batch: Batch) -> list[Tensor]:
    """The prompts without the rows that ``collate`` put behind the shorter ones."""
    prompts, mask = batch[PROMPT_EMBEDS], batch[PROMPT_MASK]
    if mask is None:
        return list(prompts)
    return [prompt[kept] for prompt, kept in zip(prompts, mask, strict=True)]
