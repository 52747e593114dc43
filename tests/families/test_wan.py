"""Wan 2.1 and 2.2 say what their real pipelines say: see tests/support/oracle.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from launch.trainer.families.video import frame_image
from launch.trainer.families.wan import CONDITION, IMAGE_EMBEDS, Wan, first_frame_mask
from launch.trainer.families.wan22 import Wan22
from launch.trainer.tiny.text import text_parts
from launch.trainer.tiny.wan import PARTS
from tests.support import oracle

CHANNELS = 4
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}


class _ImageWan(Wan):
    pipeline_class = "WanImageToVideoPipeline"


class _ImageWan22(Wan22):
    pipeline_class = "WanImageToVideoPipeline"


def read(args: Any, kwargs: Mapping[str, Any], latents: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy latents stand first among the channels; the 5B model is told a time per token."""
    timestep = kwargs["timestep"]
    per_clip = timestep if timestep.ndim == 1 else timestep[:, -1]
    return kwargs["hidden_states"][:, : latents.shape[1]], per_clip.float()


def euler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def case(family: Any, parts: str, **more: Any) -> oracle.Case:
    # The scheduler as it is shipped, UniPC, tells the network whole numbers for timesteps.
    samplers = (oracle.Sampler(make=euler), oracle.Sampler(tolerance=0.004))
    settings = {"pixels": (5, 16, 32), "video_vae": True, "samplers": samplers, **more}
    return oracle.Case(family=family, parts=PARTS[parts], read=read, lengths=(4, 4), **settings)


TWO = {"networks": ("transformer", "transformer_2")}
CASES = {
    "wan": case(Wan(), "wan"),
    "wan_i2v": case(_ImageWan(), "wan_i2v", network_class=I2V),
    "wan22": case(Wan22(), "wan22", **TWO),
    "wan22_i2v": case(_ImageWan22(), "wan22_i2v", network_class={"in_channels": 36}, **TWO),
    "wan22_5b": case(Wan22(), "wan22_5b", pixels=(5, 32, 64)),
}
IMAGES = [name for name in CASES if name.endswith("i2v")]


@pytest.mark.parametrize("name", CASES)
def test_a_perfect_network_gives_the_picture_back(name: str) -> None:
    oracle.check_oracle(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_training_call_is_the_pipelines_call(name: str) -> None:
    oracle.check_call(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_guidance_asks_for_both_prompts(name: str) -> None:
    oracle.check_guidance(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient(name: str, tmp_path: Path) -> None:
    oracle.check_train(CASES[name], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_the_tiny_network_has_the_names_of_the_full_one(name: str) -> None:
    oracle.check_names(CASES[name])


def without_condition(original: Any, model: Any, noisy: Tensor, time: Tensor, batch: Any) -> Tensor:
    grey = {**batch, CONDITION: torch.zeros_like(batch[CONDITION])}
    return original(model, noisy, time, grey)


def condition_first(original: Any, model: Any, noisy: Tensor, time: Tensor, batch: Any) -> Tensor:
    """Noisy latents and condition change places."""

    def call(hidden_states: Tensor, **kwargs: Any) -> Any:
        parts = hidden_states.split(CHANNELS, dim=1)
        return model(hidden_states=torch.cat([parts[2], parts[1], parts[0]], dim=1), **kwargs)

    return original(call, noisy, time, batch)


def unmasked(original: Any, model: Any, noisy: Tensor, time: Tensor, batch: Any) -> Tensor:
    """The mask says that every frame is given."""

    def call(hidden_states: Tensor, **kwargs: Any) -> Any:
        hidden_states[:, CHANNELS : 2 * CHANNELS] = 1
        return model(hidden_states=hidden_states, **kwargs)

    return original(call, noisy, time, batch)


IMAGE_MUTANTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "the condition is left out": ("predict", without_condition),
    "the condition stands before the noise": ("predict", condition_first),
    "every frame counts as given": ("predict", unmasked),
}


@pytest.mark.parametrize("name", ["wan", "wan22_5b", *IMAGES])
def test_a_family_changed_on_purpose_is_found(name: str) -> None:
    found, extra = CASES[name], IMAGE_MUTANTS if name in IMAGES else {}
    for method, change in {**oracle.mutants_of(found), **extra}.values():
        oracle.check_mutant(found, oracle.mutant(found.family, method, change))


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_the_cached_condition_is_what_the_pipeline_makes_of_the_picture(name: str) -> None:
    found = CASES[name]
    pipeline = oracle.make_pipeline(found)
    clip = oracle.make_pixels(found)[0]
    image = frame_image(clip[:, 0])
    # The pipeline reads whole levels of brightness.
    clip = ((clip + 1) * 127.5).round() / 127.5 - 1
    cached = found.family.encode_pixels(pipeline, clip)
    with oracle.recorded(found, pipeline) as calls:
        pipeline(
            image=image,
            prompt_embeds=torch.zeros(1, 512, 16),
            **found.family.pixel_size(pipeline, cached["latents"]),
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
        )
    condition = cached[CONDITION][None]
    wanted = torch.cat([first_frame_mask(condition), condition], dim=1)
    seen = calls[0].kwargs
    assert oracle.apart(seen["hidden_states"][:, CHANNELS:], wanted) < 1e-5
    # Frames that are not given are grey pixels, whose latents are not 0.
    assert condition[:, :, 1:].abs().max() > 0.1
    if IMAGE_EMBEDS in cached:
        embeds = seen["encoder_hidden_states_image"]
        assert oracle.apart(embeds, cached[IMAGE_EMBEDS][None]) < 1e-5


def test_cached_prompts_are_what_the_pipeline_makes_of_the_captions() -> None:
    oracle.check_text(CASES["wan"], ("a cat purrs", "rain"), **text_parts("wan"))


def test_each_expert_is_asked_on_its_side_of_the_boundary() -> None:
    found = CASES["wan22"]
    pipeline = oracle.make_pipeline(found)
    batch = found.family.collate(oracle.make_samples(found, found.family, pipeline))
    with oracle.recorded(found, pipeline) as calls:
        oracle.run_pipeline(found, found.family, pipeline, batch, 6)
    asked = [(call.network, float(call.kwargs["timestep"][0]) >= 875) for call in calls]
    assert {("transformer", True), ("transformer_2", False)} == set(asked)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (Wan(), {"in_channels": 36, "out_channels": 16}, "no image_dim: set model_type='wan22'"),
        (Wan(), {"in_channels": 48, "out_channels": 48}, "5B model. Set model_type='wan22'"),
        (Wan(), {**I2V, "pos_embed_seq_len": 514}, "first-and-last-frame"),
        (Wan(), {"in_channels": 32, "out_channels": 16}, "camera, control"),
        (Wan22(), I2V, "set model_type='wan'"),
        (Wan22(), {"in_channels": 52, "out_channels": 16}, "camera, control"),
    ],
)
def test_other_variants_are_refused_by_the_key_that_tells_them(
    family: Wan, change: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ModelSourceError, match=message):
        family.check_config({"in_channels": 16, "out_channels": 16, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_embeds": torch.zeros(300, 16)}, r"prompt_embeds has shape .*needs \(512, 16\)"),
        ({CONDITION: torch.zeros(4, 3, 4, 6)}, r"condition has shape .*\(4, 3, 4, 8\), as latents"),
        ({IMAGE_EMBEDS: None}, "image_embeds is missing"),
    ],
)
def test_an_image_to_video_sample_is_refused_where_it_would_be_misread(
    change: Mapping[str, Any], message: str
) -> None:
    sample = {
        "latents": torch.zeros(4, 3, 4, 8),
        "prompt_embeds": torch.zeros(512, 16),
        CONDITION: torch.zeros(4, 3, 4, 8),
        IMAGE_EMBEDS: torch.zeros(5, 8),
    }
    config = dict(PARTS["wan_i2v"]()["transformer"].config)
    Wan().check_sample(config, sample)
    changed = {k: v for k, v in {**sample, **change}.items() if v is not None}
    with pytest.raises(ModelSourceError, match=message):
        Wan().check_sample(config, changed, "a.safetensors")


def test_a_condition_is_refused_by_a_text_to_video_model() -> None:
    config = dict(PARTS["wan"]()["transformer"].config)
    sample = {"latents": torch.zeros(4, 3, 4, 8), "prompt_embeds": torch.zeros(512, 16)}
    with pytest.raises(ModelSourceError, match="holds condition, which this model does not take"):
        Wan().check_sample(config, {**sample, CONDITION: sample["latents"]})


def test_prompts_of_two_lengths_are_refused_in_one_batch() -> None:
    samples = [
        {"latents": torch.zeros(4, 1, 2, 2), "prompt_embeds": torch.zeros(n, 16)} for n in (3, 5)
    ]
    with pytest.raises(ModelSourceError, match=r"prompt_embeds of 3, 5 rows.*train\.micro_batch=1"):
        Wan().collate(samples)
