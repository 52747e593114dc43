"""The flow-matching image families on tiny parts, and how their pipelines call the networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from launch.trainer.families import get_family
from launch.trainer.families.latents import from_patches, from_tokens, to_patches, to_tokens
from launch.trainer.tiny import chroma, flux2, qwen, sana, sd35, zimage
from tests.support.oracle import Case, Sampler


def _tokens(output: Tensor, latents: Tensor) -> Tensor:
    return from_tokens(output, *latents.shape[-2:])


def _patches(output: Tensor, latents: Tensor) -> Tensor:
    return from_patches(output, *latents.shape[-2:])


def _case(name: str, module: Any, **settings: Any) -> Case:
    defaults = {"read": _read, "parts": module.PARTS[name]}
    return Case(family=get_family(name), **{**defaults, **settings})


def _read(args: Any, kwargs: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    return kwargs["hidden_states"], kwargs["timestep"]


def _reader(lay_out: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """For networks that multiply the timestep by 1000 themselves."""
    return lambda args, kwargs, latents: (
        lay_out(kwargs["hidden_states"], latents),
        1000 * kwargs["timestep"],
    )


def _with_bool_masks(pipeline: Any) -> None:
    """The pipeline's own masks are float: its network adds them to the scores as 0 and 1."""
    encode = pipeline.encode_prompt

    def encode_prompt(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        prompt, ids, mask, *negative, negative_mask = encode(*args, **kwargs)
        masks = [None if one is None else one.bool() for one in (mask, negative_mask)]
        return prompt, ids, masks[0], *negative, masks[1]

    pipeline.encode_prompt = encode_prompt


IN_TOKENS = {"read": _reader(_tokens), "answer": to_tokens, "said": _tokens}
IN_PATCHES = {"read": _reader(_patches), "answer": to_patches, "said": _patches}
STRAIGHT = Sampler(make=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0))
SANA = {
    "read": lambda args, kwargs, latents: (args[0], kwargs["timestep"]),
    # The shipped solver hands the network whole timesteps, cut and not rounded.
    "samplers": (STRAIGHT, Sampler(tolerance=2e-2)),
}
MEDIUM = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
CASES = {
    "flux_2_dev": _case("flux_2_dev", flux2, **IN_TOKENS),
    "flux_2_klein_4b": _case(
        "flux_2_klein_4b", flux2, **IN_TOKENS, network_class={"guidance_embeds": False}
    ),
    "sd35_medium": _case("sd35", sd35, network_class=MEDIUM),
    "sd35_large": _case(
        "sd35",
        sd35,
        parts=partial(sd35.parts, dual_attention_layers=()),
        network_class={"qk_norm": "rms_norm"},
    ),
    "qwen": _case("qwen", qwen, **IN_PATCHES, video_vae=True),
    # 60 tokens of the image, which the network pads to 64.
    "zimage": _case(
        "zimage",
        zimage,
        read=lambda args, kwargs, latents: (torch.stack(args[0]).squeeze(2), 1000 * (1 - args[1])),
        answer=lambda velocity: list(-velocity.unsqueeze(2)),
        said=lambda output, latents: -torch.stack(output).squeeze(2),
        pixels=(1, 24, 40),
    ),
    "chroma_1": _case("chroma_1", chroma, **IN_PATCHES, mend=_with_bool_masks),
    "sana": _case("sana", sana, **SANA),
    "sana_1.5": _case(
        "sana",
        sana,
        **SANA,
        parts=partial(sana.parts, qk_norm="rms_norm_across_heads"),
        network_class={"qk_norm": "rms_norm_across_heads"},
    ),
}
