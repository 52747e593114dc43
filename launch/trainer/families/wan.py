"""Wan 2.1 and 2.2 text-to-video transformers (diffusers ``WanTransformer3DModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample
from launch.trainer.families.checks import Layout, misfit, shape_of
from launch.trainer.families.diffusion import ATTENTION, Diffusion

PROMPT_TOKENS = 512
"""Rows of a cached prompt: the network has no mask, so that the zeros behind it are part of what
it was trained on."""


class Wan(Diffusion):
    """Text-to-video Wan: the prompt is the only condition, one timestep per clip."""

    model_type = "wan"
    class_name = "WanTransformer3DModel"
    pipeline_class = "WanPipeline"
    # Its forward reads the dtype of its first parameter.
    flat_units = ("condition_embedder.time_embedder",)
    # What the pipeline's scheduler is shipped with.
    defaults = {"shift": 3.0, "sample_shift": 3.0}

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, and image-to-video checkpoints, whose inputs nothing here gives."""
        super().check_config(model_config)
        channels, out_channels = model_config.get("in_channels"), model_config.get("out_channels")
        if out_channels not in (None, channels) or model_config.get("image_dim") is not None:
            raise ModelSourceError(
                f"model_path holds an image-to-video Wan (in_channels={channels},"
                f" out_channels={out_channels}, image_dim={model_config.get('image_dim')}). Only"
                " text-to-video is trained here; use a T2V model."
            )

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return both attentions and the feed-forward; see ``Family.lora_targets``."""
        attentions = [f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ATTENTION]
        return (*attentions, "ffn.net.0.proj", "ffn.net.2")

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        output: tuple[Tensor, ...] = model(
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            return_dict=False,
        )
        return output[0]

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches of the latents; see ``Family.tokens``."""
        sizes = zip(sample[LATENTS].shape[1:], model_config["patch_size"], strict=True)
        return prod(size // step for size, step in sizes)

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        return {
            LATENTS: (model_config["in_channels"], "F", "H", "W"),
            PROMPT_EMBEDS: ("L", model_config["text_dim"]),
        }

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse wrong channels, a size the patches do not tile, or another text encoder's width.

        Raises:
            ModelSourceError: label, field, shape found and shape needed.
        """
        self.check_config(model_config)
        _check_latents(model_config, shape_of(sample, LATENTS, 4, "(C, F, H, W)", label), label)
        super().check_sample(model_config, sample, label)

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE; see ``Diffusion.encode_pixels``."""
        vae = pipeline.vae
        mean, std = (
            torch.tensor(values).view(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        raw = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
        return {LATENTS: (raw.to("cpu", torch.float32) - mean) / std}

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return 512 rows, zeros behind the prompt; see ``Diffusion.encode_prompt``."""
        prompt, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return {PROMPT_EMBEDS: prompt[0]}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """See ``Diffusion.pipeline_inputs``."""
        inputs = {"prompt_embeds": batch[PROMPT_EMBEDS], "guidance_scale": guidance}
        if guidance > 1:
            inputs["negative_prompt_embeds"] = batch["negative"][PROMPT_EMBEDS]
        return inputs

    def pixel_size(self, pipeline: Any, latents: Tensor) -> dict[str, int]:
        """Height, width and frames; see ``Diffusion.pixel_size``."""
        frames, height, width = latents.shape[-3:]
        space, time = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        return {
            "height": height * space,
            "width": width * space,
            "num_frames": (frames - 1) * time + 1,
        }


def _check_latents(model_config: Mapping[str, Any], shape: tuple[int, ...], label: str) -> None:
    channels, patch = model_config["in_channels"], tuple(model_config["patch_size"])
    if len(patch) != 3 or not all(isinstance(step, int) and step >= 1 for step in patch):
        raise ModelSourceError(
            f"Invalid patch_size={list(patch)} in config.json of model_path: must be 3 integers"
            " >= 1."
        )
    # Rotary positions are tabulated up to this many patches along each axis.
    longest = model_config.get("rope_max_seq_len", 1024)
    fits = all(
        size > 0 and size % step == 0 and size // step <= longest
        for size, step in zip(shape[1:], patch, strict=True)
    )
    if shape[0] != channels or not fits:
        needed = (
            f"({channels}, F, H, W) with F, H, W multiples of {patch}, at most {longest} patches"
            " each"
        )
        step = "use the model's own VAE, or crop the clips"
        raise misfit(label, LATENTS, shape, needed, step)
