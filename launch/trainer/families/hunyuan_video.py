"""HunyuanVideo 1.0, text-to-video (diffusers ``HunyuanVideoTransformer3DModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, PROMPT_MASK, Batch, Sample
from launch.trainer.families.checks import Layout, refuse_key
from launch.trainer.families.diffusion import Diffusion
from launch.trainer.families.video import check_tiles, clip_size, tiles

POOLED = "pooled"
"""Field of a sample: (D,), CLIP's pooled vector."""
GUIDANCE = 1.0
"""What a training step tells the network, whose guidance was distilled into it. More would train
towards clips that are guided already."""
_EMBEDDED = 1000.0
"""The network takes guidance times this, as its pipeline passes it."""


class HunyuanVideo(Diffusion):
    """HunyuanVideo 1.0: text of several lengths behind a mask, and a guidance of its own."""

    model_type = "hunyuan_video"
    class_name = "HunyuanVideoTransformer3DModel"
    pipeline_class = "HunyuanVideoPipeline"
    # What the scheduler is shipped with, and what the usual trainers draw with.
    defaults = {"shift": 7.0, "sample_shift": 7.0}
    prompt_fields = (PROMPT_EMBEDS, POOLED)
    ragged = True

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, HunyuanVideo 1.5 among them, and image-to-video checkpoints."""
        super().check_config(model_config)
        image = "an image-to-video HunyuanVideo; train a text-to-video one"
        refuse_key(model_config, "image_condition_type", None, image)
        plain = "a HunyuanVideo that takes no guidance; train the text-to-video release"
        refuse_key(model_config, "guidance_embeds", True, plain)

    def lora_targets(self, model_config: Mapping[str, Any]) -> str:
        """Return the attentions of both stacks, not the text refiner's; see ``lora_targets``."""
        # A whole-name expression: endings would take the refiner's projections too, which bear the
        # same names.
        projections = r"to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out"
        return rf"(single_)?transformer_blocks\.\d+\.attn\.({projections})"

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            encoder_attention_mask=_mask(batch),
            pooled_projections=batch[POOLED],
            guidance=torch.full_like(timestep, _EMBEDDED * GUIDANCE),
            return_dict=False,
        )
        return output[0]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches of the latents, and the prompt beside them; see ``Family.tokens``."""
        patches = tiles(sample[LATENTS].shape, _patch(model_config))
        return patches + len(sample[PROMPT_EMBEDS])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        # At least one row: the mean over the rows of an empty prompt is NaN.
        return {
            LATENTS: (model_config["in_channels"], "F", "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["text_embed_dim"]),
            POOLED: (model_config["pooled_projection_dim"],),
        }

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse fields with other axes, and sizes that the patches do not tile."""
        super().check_sample(model_config, sample, label)
        check_tiles(tuple(sample[LATENTS].shape), _patch(model_config), label)

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the scaled mode of the VAE; see ``Diffusion.encode_pixels``."""
        vae = pipeline.vae
        raw: Tensor = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
        return {LATENTS: raw.to("cpu", torch.float32) * vae.config.scaling_factor}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return the rows of the prompt without padding; see ``Diffusion.encode_prompt``.

        Raises:
            ModelSourceError: the tokenizer pads on the left, which the network cannot mask, or
                nothing is left of the caption.
        """
        rows, pooled, mask = pipeline.encode_prompt(caption)
        kept = mask[0].bool()
        length = int(kept.sum())
        if length == 0 or not bool(kept[:length].all()):
            raise ModelSourceError(
                f"The prompt {caption!r} came out of the text encoder with the mask"
                f" {kept.int().tolist()}. Tokens must stand first, at least one: set"
                " padding_side='right' in tokenizer/tokenizer_config.json."
            )
        return {PROMPT_EMBEDS: rows[0, :length], POOLED: pooled[0]}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """Return the prompts; guidance is embedded, without a negative prompt.

        See ``Diffusion.pipeline_inputs``.
        """
        return {
            "prompt_embeds": batch[PROMPT_EMBEDS],
            "prompt_attention_mask": _mask(batch),
            "pooled_prompt_embeds": batch[POOLED],
            "guidance_scale": guidance,
            "true_cfg_scale": 1.0,
        }

    def pixel_size(self, pipeline: Any, latents: Tensor) -> dict[str, int]:
        """Height, width and frames; see ``Diffusion.pixel_size``."""
        scales = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        return clip_size(latents, *scales)


def _mask(batch: Batch) -> Tensor:
    """Return the mask of the prompts; the network asks for one even where all is tokens."""
    mask: Tensor | None = batch[PROMPT_MASK]
    if mask is not None:
        return mask
    rows: Tensor = batch[PROMPT_EMBEDS]
    return rows.new_ones(rows.shape[:2], dtype=torch.bool)


def _patch(model_config: Mapping[str, Any]) -> tuple[int, int, int]:
    space = model_config["patch_size"]
    return model_config["patch_size_t"], space, space
