"""Sana 1.0 and 1.5 (diffusers ``SanaTransformer2DModel``)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import Diffusion, tokens_of
from launch.trainer.families.latents import encode_image
from launch.trainer.families.prompts import with_mask

PROMPT_TOKENS = 300


class Sana(Diffusion):
    """Linear attention on the 32 x compressed latents of ``AutoencoderDC``; prompts have a mask."""

    model_type = "sana"
    class_name = "SanaTransformer2DModel"
    pipeline_class = "SanaPipeline"
    # The shift that the scheduler is shipped with, in training as in sampling.
    defaults = {"shift": 3.0, "sample_shift": 3.0}
    ragged = True

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and Sprint; see ``Family.check_config``."""
        super().check_config(model_config)
        step = "this is Sana Sprint, which is distilled and no flow model; use Sana 1.0 or 1.5"
        refuse_key(model_config, "guidance_embeds", False, step)
        refuse_key(model_config, "timestep_scale", 1.0, step)

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the projections into both attentions, as Sana's own recipe."""
        return ("to_q", "to_k", "to_v")

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            encoder_attention_mask=batch[PROMPT_MASK],
            return_dict=False,
        )
        return output[0]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Latent pixels; see ``Family.tokens``."""
        return tokens_of(sample, model_config["patch_size"])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["caption_channels"]),
        }

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the scaled output of the encoder, which draws no distribution."""
        vae = pipeline.vae
        return {LATENTS: encode_image(vae, pixels) * vae.config.scaling_factor}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the prompt's rows under the instruction that the pipeline puts before it."""
        # A default of the call that encode_prompt itself does not have. The negative prompt, and
        # that is the empty one, gets none.
        asked = inspect.signature(type(pipeline).__call__).parameters
        instruction = asked["complex_human_instruction"].default if caption else None
        prompt, mask, *_ = pipeline.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            max_sequence_length=PROMPT_TOKENS,
            complex_human_instruction=instruction,
        )
        return {PROMPT_EMBEDS: prompt[0][mask[0].bool()]}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """See ``Diffusion.pipeline_inputs``."""
        prompt, mask = with_mask(batch)
        inputs: dict[str, Any] = {"use_resolution_binning": False, "guidance_scale": guidance}
        # Its default is "", which is refused beside embeddings.
        inputs["negative_prompt"] = None
        if guidance > 1:
            negative, negative_mask = with_mask(batch["negative"])
            # The pipeline puts both into one batch.
            longest = max(prompt.shape[1], negative.shape[1])
            prompt, mask = _longer(prompt, mask, longest)
            negative, negative_mask = _longer(negative, negative_mask, longest)
            inputs["negative_prompt_embeds"] = negative
            inputs["negative_prompt_attention_mask"] = negative_mask
        return {**inputs, "prompt_embeds": prompt, "prompt_attention_mask": mask}


def _longer(prompt: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pad to ``length`` rows, masked."""
    more = length - prompt.shape[1]
    return pad(prompt, (0, 0, 0, more)), pad(mask, (0, more))
