"""Flow-matching image families against their real pipelines, on tiny parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from launch.trainer.families import get_family
from launch.trainer.families.latents import from_patches, from_tokens, to_patches, to_tokens
from launch.trainer.tiny import chroma, flux2, qwen, sd35, zimage
from launch.trainer.tiny import sana as sana_parts
from tests.support.oracle import (
    Case,
    Sampler,
    check_call,
    check_guidance,
    check_mutant,
    check_names,
    check_oracle,
    check_ragged,
    check_train,
    mutant,
    mutants_of,
)


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


in_tokens = {"read": _reader(_tokens), "answer": to_tokens, "said": _tokens}
in_patches = {"read": _reader(_patches), "answer": to_patches, "said": _patches}
straight = Sampler(make=lambda: FlowMatchEulerDiscreteScheduler(shift=3.0))
sana = {
    "read": lambda args, kwargs, latents: (args[0], kwargs["timestep"]),
    # The shipped solver hands the network whole timesteps, cut and not rounded.
    "samplers": (straight, Sampler(tolerance=2e-2)),
}
medium = {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}
CASES = {
    "flux_2_dev": _case("flux_2_dev", flux2, **in_tokens),
    "flux_2_klein_4b": _case(
        "flux_2_klein_4b", flux2, **in_tokens, network_class={"guidance_embeds": False}
    ),
    "sd35_medium": _case("sd35", sd35, network_class=medium),
    "sd35_large": _case(
        "sd35",
        sd35,
        parts=partial(sd35.parts, dual_attention_layers=()),
        network_class={"qk_norm": "rms_norm"},
    ),
    "qwen": _case("qwen", qwen, **in_patches, video_vae=True),
    # 60 tokens of the image, which the network pads to 64.
    "zimage": _case(
        "zimage",
        zimage,
        read=lambda args, kwargs, latents: (torch.stack(args[0]).squeeze(2), 1000 * (1 - args[1])),
        answer=lambda velocity: list(-velocity.unsqueeze(2)),
        said=lambda output, latents: -torch.stack(output).squeeze(2),
        pixels=(1, 24, 40),
    ),
    "chroma_1": _case("chroma_1", chroma, **in_patches),
    "sana": _case("sana", sana_parts, **sana),
    "sana_1.5": _case(
        "sana",
        sana_parts,
        **sana,
        parts=partial(sana_parts.parts, qk_norm="rms_norm_across_heads"),
        network_class={"qk_norm": "rms_norm_across_heads"},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_the_pipeline_walks_back_to_the_vaes_picture_when_the_answers_are_true(case: Case) -> None:
    check_oracle(case)


@every_case
def test_the_training_call_is_the_pipelines_call(case: Case) -> None:
    check_call(case)


@every_case
def test_padding_is_neither_read_nor_counted(case: Case) -> None:
    check_ragged(case)


@every_case
def test_exactly_the_names_without_gradient_get_none(case: Case, tmp_path: Path) -> None:
    check_train(case, tmp_path)


@every_case
def test_the_tiny_network_has_the_full_ones_kinds_of_names(case: Case) -> None:
    check_names(case)


@pytest.mark.parametrize("name", [name for name in CASES if name != "flux_2_dev"])
def test_guidance_asks_for_the_prompt_and_the_negative_prompt(name: str) -> None:
    check_guidance(CASES[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family.ragged])
def test_prompts_of_one_length_need_no_mask(name: str) -> None:
    case = replace(CASES[name], lengths=(4, 4))
    check_call(case)
    check_guidance(case)


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name, case in CASES.items() for label in mutants_of(case)]
)
def test_a_family_that_was_changed_is_told_from_the_pipeline(name: str, label: str) -> None:
    case = CASES[name]
    check_mutant(case, mutant(case.family, *mutants_of(case)[label]))
