"""Flow-matching image families against their real pipelines, on tiny parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from torch import Tensor

from launch.trainer.families import get_family
from launch.trainer.families.latents import from_tokens, to_tokens
from launch.trainer.tiny import flux2
from tests.support.oracle import (
    Case,
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


FLUX2 = Case(
    family=get_family("flux_2_klein_4b"),
    parts=flux2.PARTS["flux_2_klein_4b"],
    read=lambda args, kwargs, latents: (
        _tokens(kwargs["hidden_states"], latents),
        1000 * kwargs["timestep"],
    ),
    answer=to_tokens,
    said=_tokens,
    network_class={"guidance_embeds": False},
)
CASES = {
    "flux_2_klein_4b": FLUX2,
    "flux_2_dev": dataclasses.replace(
        FLUX2,
        family=get_family("flux_2_dev"),
        parts=flux2.PARTS["flux_2_dev"],
        network_class={},
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


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name, case in CASES.items() for label in mutants_of(case)]
)
def test_a_family_that_was_changed_is_told_from_the_pipeline(name: str, label: str) -> None:
    case = CASES[name]
    check_mutant(case, mutant(case.family, *mutants_of(case)[label]))
