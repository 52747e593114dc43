"""Wan 2.1: text-to-video and image-to-video transformers (diffusers ``WanTransformer3DModel``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample, stack
from launch.trainer.families.checks import Layout, misfit, refuse_key, shape_of
from launch.trainer.families.diffusion import ATTENTION, Diffusion
from launch.trainer.families.video import clip_size, frame_image, one_length, tiles

PROMPT_TOKENS = 512
"""Rows of a cached prompt: the network has no mask, so that the zeros behind it are part of what
it was trained on."""
CONDITION, IMAGE_EMBEDS = "condition", "image_embeds"
"""Fields of an image-to-video sample: latents of the first frame with grey ones behind it, like
``latents``, and for 2.1 what CLIP sees in that frame, (257, D)."""
FRAMES_PER_LATENT = 4
"""Channels of the mask: one for each frame of pixels that a latent frame stands for."""
_FIVE_B_CHANNELS = 48


class Wan(Diffusion):
    """Wan 2.1: one network, one timestep per clip; image-to-video takes its first frame too."""

    model_type = "wan"
    class_name = "WanTransformer3DModel"
    pipeline_class = "WanPipeline"
    # Its forward reads the dtype of its first parameter.
    flat_units = ("condition_embedder.time_embedder",)
    # What the pipeline's scheduler is shipped with.
    defaults = {"shift": 3.0, "sample_shift": 3.0}

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse another class, first-and-last-frame models, and those of Wan 2.2."""
        super().check_config(model_config)
        last = "a first-and-last-frame Wan; train a text-to-video or image-to-video one"
        refuse_key(model_config, "pos_embed_seq_len", None, last)
        self.check_version(model_config)

    def check_version(self, model_config: Mapping[str, Any]) -> None:
        """Refuse what the config shows to be Wan 2.2, and channels that no Wan has."""
        channels, clip = channels_of(model_config), model_config.get("image_dim")
        if channels.extra == 0 and channels.latents == _FIVE_B_CHANNELS:
            raise ModelSourceError(
                f"config.json of model_path has in_channels={channels.latents}: that is Wan 2.2's"
                " 5B model. Set model_type='wan22'."
            )
        check_channels(model_config)
        if (channels.extra > 0) != (clip is not None):
            raise ModelSourceError(
                f"config.json of model_path has in_channels={channels.latents + channels.extra},"
                f" out_channels={channels.latents} and image_dim={clip}: Wan 2.1 image-to-video"
                " has more channels in than out and an image_dim, text-to-video neither. Wan 2.2's"
                " image-to-video has no image_dim: set model_type='wan22' for it."
            )

    def pipeline_name(self, model_config: Mapping[str, Any]) -> str:
        """Return the class of the pipeline; see ``Diffusion.pipeline_name``."""
        image = channels_of(model_config).extra > 0
        return "WanImageToVideoPipeline" if image else self.pipeline_class

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return both attentions and the feed-forward; see ``Family.lora_targets``."""
        attentions = [f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ATTENTION]
        if model_config.get("added_kv_proj_dim") is not None:
            # Without these what CLIP saw would reach the clip by frozen layers only.
            attentions += ["attn2.add_k_proj", "attn2.add_v_proj"]
        return (*attentions, "ffn.net.0.proj", "ffn.net.2")

    def predict(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the network; see ``Diffusion.predict``."""
        inputs = noisy
        if CONDITION in batch:
            inputs = torch.cat([noisy, first_frame_mask(noisy), batch[CONDITION]], dim=1)
        seen = {}
        if IMAGE_EMBEDS in batch:
            seen["encoder_hidden_states_image"] = batch[IMAGE_EMBEDS]
        output: tuple[Tensor, ...] = model(
            hidden_states=inputs,
            timestep=timestep,
            encoder_hidden_states=batch[PROMPT_EMBEDS],
            return_dict=False,
            **seen,
        )
        return output[0]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the samples; refuse prompts of several lengths, which the network cannot mask."""
        one_length(samples, PROMPT_EMBEDS, f"encode all prompts to {PROMPT_TOKENS} rows")
        return stack(samples)

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Patches of the latents; see ``Family.tokens``."""
        return tiles(sample[LATENTS].shape, model_config["patch_size"])

    def layout(self, model_config: Mapping[str, Any]) -> Mapping[str, Layout]:
        """The axes of each field of a sample."""
        channels, clip = channels_of(model_config), model_config.get("image_dim")
        latents = (channels.latents, "F", "H", "W")
        found: dict[str, Layout] = {LATENTS: latents}
        # The first attention layer with added projections counts 512 rows from the end: of a
        # shorter prompt a part would be read as image.
        found[PROMPT_EMBEDS] = ("L" if clip is None else PROMPT_TOKENS, model_config["text_dim"])
        if channels.extra:
            found[CONDITION] = latents
        if clip is not None:
            found[IMAGE_EMBEDS] = ("T", clip)
        return found

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse wrong channels, a size the patches do not tile, or another text encoder's width.

        Raises:
            ModelSourceError: label, field, shape found and shape needed.
        """
        self.check_config(model_config)
        shape = shape_of(sample, LATENTS, 4, "(C, F, H, W)", label)
        _check_latents(model_config, shape, label)
        super().check_sample(model_config, sample, label)
        extra = {CONDITION, IMAGE_EMBEDS} & (sample.keys() - self.layout(model_config).keys())
        if extra:
            raise ModelSourceError(
                f"{label}: holds {' and '.join(sorted(extra))}, which this model does not take: it"
                " was encoded for another one. Encode it again with this model's own pipeline."
            )
        condition = sample.get(CONDITION)
        if condition is not None and tuple(condition.shape) != shape:
            step = "encode it again with the model's own pipeline"
            raise misfit(label, CONDITION, tuple(condition.shape), f"{shape}, as latents", step)

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE, of an image-to-video pipeline the condition too.

        See ``Diffusion.encode_pixels``.
        """
        found = {LATENTS: _encoded(pipeline.vae, pixels)}
        # The 5B model's condition is the first frame of the latents themselves.
        if not hasattr(pipeline, "encode_image") or pipeline.config.expand_timesteps:
            return found
        # Grey, the value 0, is what the pipeline puts where a frame is not given. The VAE looks
        # back in time, so its latents are not 0 there.
        grey = torch.zeros_like(pixels[:, 1:])
        found[CONDITION] = _encoded(pipeline.vae, torch.cat([pixels[:, :1], grey], dim=1))
        if pipeline.image_encoder is not None:
            seen = pipeline.encode_image(frame_image(pixels[:, 0]))
            found[IMAGE_EMBEDS] = seen[0].to("cpu", torch.float32)
        return found

    def encode_prompt(self, pipeline: Any, caption: str) -> Mapping[str, Tensor]:
        """Return 512 rows, zeros behind the prompt; see ``Diffusion.encode_prompt``."""
        prompt, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        return {PROMPT_EMBEDS: prompt[0]}

    def pipeline_inputs(self, batch: Batch, guidance: float) -> dict[str, Any]:
        """See ``Diffusion.pipeline_inputs``."""
        inputs = super().pipeline_inputs(batch, guidance)
        if CONDITION in batch:
            # The pipeline asks for an image, of which nothing is used: see pipeline_with.
            inputs["image"] = frame_image(torch.zeros(3, 8, 8))
        return inputs

    @contextmanager
    def pipeline_with(self, pipeline: Any, batch: Batch) -> Iterator[None]:
        """Have the pipeline take the cached condition; see ``Diffusion.pipeline_with``."""
        if CONDITION not in batch:
            yield
            return
        given = torch.cat([first_frame_mask(batch[CONDITION]), batch[CONDITION]], dim=1)

        def condition(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            noisy = kwargs["hidden_states"][:, : batch[CONDITION].shape[1]]
            told = {"hidden_states": torch.cat([noisy, given.to(noisy.dtype)], dim=1)}
            if IMAGE_EMBEDS in batch:
                told["encoder_hidden_states_image"] = batch[IMAGE_EMBEDS]
            return args, {**kwargs, **told}

        networks = [pipeline.transformer, pipeline.transformer_2]
        hooks = [
            network.register_forward_pre_hook(condition, with_kwargs=True)
            for network in networks
            if network is not None
        ]
        # An attribute of the object, which hides its class's method until it is deleted: the image
        # encoder need not be there.
        pipeline.encode_image = lambda *_, **__: batch[IMAGE_EMBEDS][:1]
        try:
            yield
        finally:
            del pipeline.encode_image
            for hook in hooks:
                hook.remove()

    def pixel_size(self, pipeline: Any, latents: Tensor) -> dict[str, int]:
        """Height, width and frames; see ``Diffusion.pixel_size``."""
        scales = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        return clip_size(latents, *scales)


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Channels of a network's input."""

    latents: int
    extra: int
    """Of the mask and the condition behind the noisy latents; 0: text-to-video."""


def channels_of(model_config: Mapping[str, Any]) -> Channels:
    """Read the channels off ``config.json``; its defaults are those of the class."""
    given = model_config.get("in_channels", 16)
    out = model_config.get("out_channels", 16) or given
    return Channels(latents=out, extra=given - out)


def check_channels(model_config: Mapping[str, Any]) -> None:
    """Refuse a network whose input is neither latents nor latents, mask and condition."""
    channels = channels_of(model_config)
    if channels.extra not in (0, channels.latents + FRAMES_PER_LATENT):
        raise ModelSourceError(
            f"config.json of model_path has in_channels={channels.latents + channels.extra},"
            f" out_channels={channels.latents}. Trained here are text-to-video (as many in as"
            f" out) and image-to-video (2 x out + {FRAMES_PER_LATENT}: latents, mask, condition);"
            " camera, control and reference variants need other inputs."
        )


def first_frame_mask(latents: Tensor) -> Tensor:
    """Return (B, 4, F, H, W): 1 on the first latent frame, which is given, and 0 elsewhere."""
    batch, _, *size = latents.shape
    mask = latents.new_zeros(batch, FRAMES_PER_LATENT, *size)
    mask[:, :, 0] = 1
    return mask


def _encoded(vae: Any, pixels: Tensor) -> Tensor:
    """Return the normalised mode, float32 on the CPU, of a clip (3, F, H, W)."""
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    raw: Tensor = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
    return (raw.to("cpu", torch.float32) - mean) / std


def _check_latents(model_config: Mapping[str, Any], shape: tuple[int, ...], label: str) -> None:
    channels, patch = channels_of(model_config).latents, tuple(model_config["patch_size"])
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
