"""Wan 2.1 and 2.2 text-to-video transformers (diffusers ``WanTransformer3DModel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_EMBEDS, Batch, Sample, stack
from launch.trainer.objectives.flow import FlowMatching

# Both attentions of a block, by the names of diffusers' modules; to_out.1 is a dropout.
_ATTENTION = tuple(
    f"{attn}.{proj}" for attn in ("attn1", "attn2") for proj in ("to_q", "to_k", "to_v", "to_out.0")
)


class Wan:
    """Text-to-video Wan: the prompt is the only condition, one timestep per clip."""

    model_type = "wan"
    # Its forward reads the dtype of its first parameter.
    flat_units = ("condition_embedder.time_embedder",)
    lora_targets = (*_ATTENTION, "ffn.net.0.proj", "ffn.net.2")

    def __init__(self) -> None:
        self.objective = FlowMatching(velocity=self.velocity)

    @property
    def model_class(self) -> type[nn.Module]:
        """``diffusers.WanTransformer3DModel``, imported on first use."""
        from diffusers import WanTransformer3DModel

        model_class: type[nn.Module] = WanTransformer3DModel
        return model_class

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the model; see ``Family.build``."""
        model_class: Any = self.model_class
        model: nn.Module = model_class.from_config(model_config)
        return model

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack clips of one size; see ``Family.collate``."""
        return stack(samples)

    def velocity(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        """Call the model, however wrapped, and return the velocity (B, C, F, H, W).

        Args:
            model: The model or its DDP, FSDP or DeepSpeed wrapper.
            noisy: (B, C, F, H, W), on the model's device and in its input dtype.
            timestep: (B,) in [0, 1000].
            batch: ``prompt_embeds`` (B, L, D) like ``noisy`` in device and dtype.
        """
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

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse wrong channels, a size the patches do not tile, or another text encoder's width.

        Raises:
            ModelSourceError: label, field, shape found and shape needed.
        """
        _check_text_to_video(model_config)
        _check_latents(model_config, _field(sample, LATENTS, 4, "(C, F, H, W)", label), label)
        prompt = _field(sample, PROMPT_EMBEDS, 2, "(L, D)", label)
        width = model_config["text_dim"]
        if prompt[0] < 1 or prompt[1] != width:
            raise _misfit(
                label,
                PROMPT_EMBEDS,
                prompt,
                f"(L, {width}) with L >= 1",
                "use the model's text encoder",
            )


def _check_text_to_video(model_config: Mapping[str, Any]) -> None:
    """Refuse image-to-video checkpoints, whose extra inputs nothing here provides."""
    channels, out_channels = model_config["in_channels"], model_config.get("out_channels")
    if out_channels not in (None, channels) or model_config.get("image_dim") is not None:
        raise ModelSourceError(
            f"model_path holds an image-to-video Wan (in_channels={channels},"
            f" out_channels={out_channels}, image_dim={model_config.get('image_dim')}). Only"
            " text-to-video is trained here; use a T2V model."
        )


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
        raise _misfit(label, LATENTS, shape, needed, "use the model's own VAE, or crop the clips")


def _field(sample: Sample, field: str, ndim: int, layout: str, label: str) -> tuple[int, ...]:
    """Return the shape of ``sample[field]``, which must have ``ndim`` dimensions."""
    if field not in sample:
        raise ModelSourceError(
            f"{label}: {field} is missing. Needed: a tensor {layout}; found {sorted(sample)}."
        )
    shape = tuple(sample[field].shape)
    if len(shape) != ndim:
        raise _misfit(label, field, shape, layout, "store samples without a batch dimension")
    return shape


def _misfit(
    label: str, field: str, found: tuple[int, ...], needed: str, step: str
) -> ModelSourceError:
    return ModelSourceError(
        f"{label}: {field} has shape {found}. This model needs {needed}; {step}."
    )
