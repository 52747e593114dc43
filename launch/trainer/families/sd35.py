"""Stable Diffusion 3.5 medium and large (diffusers ``SD3Transformer2DModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample
from launch.trainer.families.checks import Layout, misfit, refuse_key
from launch.trainer.families.diffusion import ATTENTION, Diffusion, tokens_of
from launch.trainer.families.latents import encode_image, shifted_and_scaled

POOLED = "pooled"
"""Field of a sample: (D,), the pooled vectors of both CLIP encoders side by side."""
PROMPT_TOKENS = 77 + 256
"""Rows of a cached prompt: CLIP's and behind them T5's. The network has no mask: the encoders'
output at padding is part of what it was trained on, so that nothing is cut or zeroed."""
_TARGETS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class SD35(Diffusion):
    """Two CLIP encoders and T5; the pooled vectors of both CLIPs are a condition of their own."""

    model_type = "sd35"
    class_name = "SD3Transformer2DModel"
    pipeline_class = "StableDiffusion3Pipeline"
    # The shift that the scheduler is shipped with, in training as in sampling.
    defaults = {"shift": 3.0, "sample_shift": 3.0}
    prompt_fields = (PROMPT_EMBEDS, POOLED)
    patch = 2

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and version 3.0; see ``Family.check_config``."""
        super().check_config(model_config)
        # A config that says nothing is one without: version 3.0's.
        found = {"qk_norm": model_config.get("qk_norm")}
        step = "this is Stable Diffusion 3.0; use 3.5 medium or large"
        refuse_key(found, "qk_norm", "rms_norm", step)

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the joint attention of both streams, and not medium's second attention."""
        return tuple(f"attn.{name}" for name in _TARGETS)

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            pooled_projections=batch[POOLED],
            return_dict=False,
        )
        return output[0]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches and the prompt; see ``Family.tokens``."""
        return tokens_of(sample, self.patch) + PROMPT_TOKENS

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "H", "W"),
            PROMPT_EMBEDS: (PROMPT_TOKENS, model_config["joint_attention_dim"]),
            POOLED: (model_config["pooled_projection_dim"],),
        }

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse also more patches than the table of positions has; see ``Family``."""
        super().check_sample(model_config, sample, label)
        most, shape = self.patch * model_config["pos_embed_max_size"], sample[LATENTS].shape
        if max(shape[-2:]) > most:
            needed = f"H and W of at most {most}, pos_embed_max_size={most // self.patch} patches"
            raise misfit(label, LATENTS, tuple(shape), needed, "use smaller pictures")

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE; see ``Diffusion.encode_pixels``."""
        return {LATENTS: shifted_and_scaled(pipeline.vae, encode_image(pipeline.vae, pixels))}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows of all encoders, and the pooled vectors side by side."""
        prompt, _, pooled, _ = pipeline.encode_prompt(
            caption, None, None, do_classifier_free_guidance=False
        )
        return {PROMPT_EMBEDS: prompt[0], POOLED: pooled[0]}

    def pipeline_prompt(self, batch: Batch) -> dict[str, Any]:
        """See ``Diffusion.pipeline_prompt``."""
        return {"prompt_embeds": batch[PROMPT_EMBEDS], "pooled_prompt_embeds": batch[POOLED]}
