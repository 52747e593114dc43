"""The flow-matching image families on tiny parts, and how their pipelines call the networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

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


class Told:
    """A network that notes what it is told, and may be told something else."""

    def __init__(self, model: nn.Module, **changes: Callable[[Any], Any]):
        self.model, self.changes, self.seen = model, changes, {}

    def __call__(self, **inputs: Any) -> Any:
        self.seen = inputs
        changed = {name: change(inputs[name]) for name, change in self.changes.items()}
        return self.model(**{**inputs, **changed})


# Mutants of single families


def _patch_before_channel(tokens: Tensor) -> Tensor:
    """(B, N, channel x 2 x 2) -> (B, N, 2 x 2 x channel)."""
    return tokens.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


def _channel_before_patch(tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2)


def _packed_otherwise(original: Any, model: Any, *args: Any) -> Tensor:
    def packed(hidden_states: Tensor, **inputs: Any) -> tuple[Tensor]:
        answer = model(hidden_states=_patch_before_channel(hidden_states), **inputs)[0]
        return (_channel_before_patch(answer),)

    return original(packed, *args)


def _encoded_otherwise(original: Any, pipeline: Any, pixels: Tensor) -> dict[str, Tensor]:
    latents = original(pipeline, pixels)["latents"]
    return {"latents": _patch_before_channel(latents.permute(1, 2, 0)).permute(2, 0, 1)}


def _told(**changes: Callable[[Any], Any]) -> Callable[..., Tensor]:
    return lambda original, model, *args: original(Told(model, **changes), *args)


def _other_axes(ids: Tensor) -> Tensor:
    """Rows and columns exchanged."""
    return ids[:, [0, 2, 1, *range(3, ids.shape[1])]]


_turned = _told(img_ids=_other_axes)
_flux2 = {
    "patch before channel": ("encode_pixels", _encoded_otherwise),
    "positions have rows and columns exchanged": ("predict", _turned),
    "words have no positions": ("predict", _told(txt_ids=torch.zeros_like)),
}
OWN_MUTANTS: dict[str, dict[str, tuple[str, Callable[..., Any]]]] = {
    "flux_2_dev": {**_flux2, "guidance is 3.5": ("predict", _told(guidance=lambda g: 3.5 * g))},
    "flux_2_klein_4b": _flux2,
    "sd35_medium": {
        "pooled vectors are exchanged": (
            "predict",
            _told(pooled_projections=lambda pooled: pooled.flip(0)),
        ),
        "pooled vectors are dropped": ("predict", _told(pooled_projections=torch.zeros_like)),
    },
    "qwen": {
        "patch before channel": ("predict", _packed_otherwise),
        "rows and columns are exchanged in img_shapes": (
            "predict",
            _told(img_shapes=lambda shapes: [[(f, w, h)] for ((f, h, w),) in shapes]),
        ),
    },
    "zimage": {
        "padding is passed as words": (
            "predict",
            _told(cap_feats=lambda feats: list(nn.utils.rnn.pad_sequence(feats, batch_first=True))),
        ),
    },
    "chroma_1": {
        "patch before channel": ("predict", _packed_otherwise),
        "positions have rows and columns exchanged": ("predict", _turned),
        # Added to the scores, it masks nothing.
        "the mask is a float": ("predict", _told(attention_mask=lambda mask: mask.float())),
    },
}
"""Case -> what -> (method, change)."""
