"""HunyuanVideo says what its real pipeline says: see tests/support/oracle.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from launch.trainer.families.hunyuan_video import POOLED, HunyuanVideo
from launch.trainer.tiny.hunyuan_video import PARTS
from launch.trainer.tiny.text import text_parts
from tests.support import oracle

FAMILY = HunyuanVideo()
CASE = oracle.Case(
    family=FAMILY,
    parts=PARTS["hunyuan_video"],
    read=lambda args, kwargs, latents: (kwargs["hidden_states"], kwargs["timestep"]),
    pixels=(5, 16, 32),
    video_vae=True,
)


def test_a_perfect_network_gives_the_picture_back() -> None:
    oracle.check_oracle(CASE)


def test_the_training_call_is_the_pipelines_call() -> None:
    oracle.check_call(CASE)


def test_padding_changes_nothing() -> None:
    oracle.check_ragged(CASE)


def test_every_parameter_gets_a_gradient(tmp_path: Path) -> None:
    oracle.check_train(CASE, tmp_path)


def test_the_tiny_network_has_the_names_of_the_full_one() -> None:
    oracle.check_names(CASE)


def guided(original: Any, model: Any, noisy: Tensor, time: Tensor, batch: Any) -> Tensor:
    """Guidance as a person writes it."""

    def call(guidance: Tensor, **kwargs: Any) -> Any:
        return model(guidance=guidance / 1000, **kwargs)

    return original(call, noisy, time, batch)


def unpooled(original: Any, model: Any, noisy: Tensor, time: Tensor, batch: Any) -> Tensor:
    return original(model, noisy, time, {**batch, POOLED: torch.zeros_like(batch[POOLED])})


def padded_left(original: Any, samples: Any) -> Mapping[str, Any]:
    batch = dict(original(samples))
    for key in ("prompt_embeds", "prompt_mask"):
        batch[key] = batch[key].flip(1)
    return batch


MUTANTS = {
    "guidance is not times 1000": ("predict", guided),
    "the pooled vector is left out": ("predict", unpooled),
    "prompts are padded in front": ("collate", padded_left),
}


def test_a_family_changed_on_purpose_is_found() -> None:
    for method, change in {**oracle.mutants_of(CASE), **MUTANTS}.values():
        oracle.check_mutant(CASE, oracle.mutant(FAMILY, method, change))


def test_cached_prompts_are_what_the_pipeline_makes_of_the_captions() -> None:
    oracle.check_text(CASE, ("a cat purrs", "rain"), **text_parts("hunyuan_video"))


def test_guidance_reaches_the_network_as_the_pipeline_embeds_it() -> None:
    pipeline = oracle.make_pipeline(CASE)
    batch = FAMILY.collate(oracle.make_samples(CASE, FAMILY, pipeline))
    with oracle.recorded(CASE, pipeline) as calls:
        oracle.run_pipeline(CASE, FAMILY, pipeline, batch, 1, guidance=6.0)
    assert [call.kwargs["guidance"].tolist() for call in calls] == [[6000.0, 6000.0]]


def test_lora_takes_the_attentions_of_both_stacks_and_not_the_text_refiners() -> None:
    names = [name for name, _ in PARTS["hunyuan_video"]()["transformer"].named_modules()]
    found = [name for name in names if re.fullmatch(FAMILY.lora_targets({}), name)]
    # 8 projections of a double block, 3 of a single one, two blocks of each.
    assert len(found) == 22 and not any("refiner" in name for name in found)


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 1]], ids=["empty", "padded in front"])
def test_a_mask_that_the_network_misreads_is_refused_when_it_is_cached(mask: list[int]) -> None:
    encoded = torch.zeros(1, 3, 16), torch.zeros(1, 8), torch.tensor([mask])
    pipeline = SimpleNamespace(encode_prompt=lambda caption: encoded)
    with pytest.raises(ModelSourceError, match="'a cat'.*padding_side='right'"):
        FAMILY.encode_prompt(pipeline, "a cat")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "HunyuanVideo15Transformer3DModel"}, "HunyuanVideo15Transformer3DModel"),
        ({"image_condition_type": "token_replace"}, "image_condition_type='token_replace'"),
        ({"guidance_embeds": False}, "guidance_embeds=False"),
    ],
)
def test_other_variants_are_refused_by_the_key_that_tells_them(
    change: Mapping[str, Any], message: str
) -> None:
    config = dict(PARTS["hunyuan_video"]()["transformer"].config)
    FAMILY.check_config(config)
    with pytest.raises(ModelSourceError, match=message):
        FAMILY.check_config({**config, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_embeds": torch.zeros(0, 16)}, r"prompt_embeds has shape \(0, 16\)"),
        ({"latents": torch.zeros(4, 2, 3, 4)}, r"multiples of \(1, 2, 2\)"),
        ({POOLED: torch.zeros(7)}, r"pooled has shape \(7,\).*needs \(8,\)"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(change: Mapping[str, Any], message: str) -> None:
    config = PARTS["hunyuan_video"]()["transformer"].config
    sample = {
        "latents": torch.zeros(4, 2, 2, 4),
        "prompt_embeds": torch.zeros(3, 16),
        POOLED: torch.zeros(8),
    }
    FAMILY.check_sample(config, sample)
    assert FAMILY.tokens(config, sample) == 2 * 1 * 2 + 3
    with pytest.raises(ModelSourceError, match=message):
        FAMILY.check_sample(config, {**sample, **change})
