"""PixArt-Sigma (diffusers ``PixArtTransformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.alphas import NoiseDenoiser
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import tokens_of

PROMPT_TOKENS = 300
"""The most that the pipeline lets a prompt have."""
_FIRST_NAME = "Transformer2DModel"
"""What the first uploads call the class: the one it was split off from."""


class PixArt(NoiseDenoiser):
    """Text to image; the network also returns a variance, which nothing here asks for."""

    model_type = "pixart"
    class_name = "PixArtTransformer2DModel"
    pipeline_class = "PixArtSigmaPipeline"
    betas = {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
    }
    ragged = True

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and PixArt-Alpha's 1024 model; see ``Family.check_config``."""
        if model_config.get("_class_name") == _FIRST_NAME:
            model_config = {**model_config, "_class_name": self.class_name}
        super().check_config(model_config)
        step = "PixArt-Alpha's 1024 model is told size and aspect ratio; use a Sigma model"
        if model_config.get("use_additional_conditions") is not None:
            refuse_key(model_config, "use_additional_conditions", False, step)

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network; see ``Family.build``."""
        # Where the key is missing, the class goes by the size, and gives the published 1024 model
        # eight tensors that its files do not have.
        return super().build({**model_config, "use_additional_conditions": False})

    def without_decay(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the output layer; see ``Family.without_decay``.

        Half of its rows give the variance and get a gradient of zero: weight decay alone would
        move them, to zero.
        """
        return ("proj_out.weight", "proj_out.bias")

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Return the first half of the output's channels; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            encoder_attention_mask=batch[PROMPT_MASK],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )
        return output[0][:, : noisy.shape[1]]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches of the latents; see ``Family.tokens``."""
        return tokens_of(sample, model_config["patch_size"])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["caption_channels"]),
        }

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows of the prompt's own tokens."""
        # Cleaned, as the pipeline's call does it unless told otherwise; its encode_prompt does not.
        prompt, mask, _, _ = pipeline.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            clean_caption=True,
            max_sequence_length=PROMPT_TOKENS,
        )
        return {PROMPT_EMBEDS: prompt[0][mask[0].bool()]}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """See ``Diffusion.pipeline_inputs``."""
        inputs = {
            "prompt_embeds": batch[PROMPT_EMBEDS],
            "prompt_attention_mask": _mask_of(batch),
            "guidance_scale": guidance,
            # It would draw at another size than that of the latents.
            "use_resolution_binning": False,
            # Its default, "", excludes embeddings.
            "negative_prompt": None,
        }
        if guidance > 1:
            negative, wanted = batch["negative"], _mask_of(batch["negative"])
            rows = batch[PROMPT_EMBEDS].shape[1] - wanted.shape[1]
            inputs["negative_prompt_embeds"] = nn.functional.pad(
                negative[PROMPT_EMBEDS], (0, 0, 0, max(rows, 0))
            )
            inputs["negative_prompt_attention_mask"] = nn.functional.pad(wanted, (0, max(rows, 0)))
            inputs["prompt_embeds"] = nn.functional.pad(
                batch[PROMPT_EMBEDS], (0, 0, 0, max(-rows, 0))
            )
            inputs["prompt_attention_mask"] = nn.functional.pad(
                inputs["prompt_attention_mask"], (0, max(-rows, 0))
            )
        return inputs


def _mask_of(batch: Batch) -> Tensor:
    """(B, L) integers, 1 at tokens; the pipeline requires it where all rows are tokens too."""
    prompts, mask = batch[PROMPT_EMBEDS], batch[PROMPT_MASK]
    found: Tensor = prompts.new_ones(prompts.shape[:2]) if mask is None else mask
    return found.long()
