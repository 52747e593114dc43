"""Flow-matching image families against their real pipelines, on tiny parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.trainer.data.base import PROMPT_EMBEDS
from launch.trainer.tiny.text import text_parts
from tests.families.flow_cases import CASES, OWN_MUTANTS
from tests.support.oracle import (
    Case,
    check_call,
    check_guidance,
    check_mutant,
    check_names,
    check_oracle,
    check_ragged,
    check_text,
    check_train,
    mutant,
    mutants_of,
)

CAPTIONS = ("A red fox.", "Two old ships sail past a lighthouse at night")

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


def _mutants(name: str) -> Mapping[str, tuple[str, Any]]:
    return {**mutants_of(CASES[name]), **OWN_MUTANTS.get(name, {})}


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name in CASES for label in _mutants(name)]
)
def test_a_family_that_was_changed_is_told_from_the_pipeline(name: str, label: str) -> None:
    case = CASES[name]
    check_mutant(case, mutant(case.family, *_mutants(name)[label]))


# Captions


@pytest.fixture(scope="module")
def encoders() -> dict[str, dict[str, Any]]:
    """Text encoders and tokenizers by model type, made once."""
    return {case.family.model_type: text_parts(case.family.model_type) for case in CASES.values()}


VARIANTS = ("sd35_large", "sana_1.5")
"""Their prompts are those of the other variant."""


@pytest.mark.parametrize("name", [name for name in CASES if name not in VARIANTS])
def test_cached_prompts_give_what_the_pipeline_gives_for_the_captions(
    name: str, encoders: dict[str, dict[str, Any]]
) -> None:
    case = CASES[name]
    check_text(case, CAPTIONS, **encoders[case.family.model_type])


def _without_padding(original: Any, pipeline: Any, caption: str) -> Mapping[str, Any]:
    """The rows behind the prompt zeroed: a sixth of them hold more than any prompt of a test."""
    encoded = original(pipeline, caption)
    rows = encoded[PROMPT_EMBEDS].clone()
    rows[len(rows) // 3 : len(rows) // 2] = 0
    return {**encoded, PROMPT_EMBEDS: rows}


def _one_row_less(original: Any, pipeline: Any, caption: str) -> Mapping[str, Any]:
    encoded = original(pipeline, caption)
    return {**encoded, PROMPT_EMBEDS: encoded[PROMPT_EMBEDS][:-1]}


def _not_told(original: Any, pipeline: Any, caption: str) -> Mapping[str, Any]:
    """Sana without the instruction that its pipeline puts before a caption."""
    prompt, mask, *_ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    return {PROMPT_EMBEDS: prompt[0][mask[0].bool()]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("flux_2_dev", _without_padding),
        ("flux_2_klein_4b", _without_padding),
        ("sd35_medium", _without_padding),
        ("qwen", _one_row_less),
        ("zimage", _one_row_less),
        ("chroma_1", _one_row_less),
        ("sana", _one_row_less),
        ("sana", _not_told),
    ],
)
def test_a_prompt_cached_otherwise_is_told_from_the_pipelines(
    name: str, change: Any, encoders: dict[str, dict[str, Any]]
) -> None:
    case = CASES[name]
    changed = replace(case, family=mutant(case.family, "encode_prompt", change))
    with pytest.raises(AssertionError, match="differs from the pipeline's"):
        check_text(changed, CAPTIONS, **encoders[case.family.model_type])
