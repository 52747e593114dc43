"""Families that predict noise against their real pipelines, on tiny parts; traps that they set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dist_layerlr import attach, plan_model
from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.base import LATENTS, PROMPT_MASK, Batch
from launch.trainer.families import get_family
from launch.trainer.objectives.noise import NoisePrediction
from launch.trainer.tiny import pixart, sd15, sdxl
from launch.trainer.weights import spare_from_decay
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
    make_pipeline,
    make_samples,
    mutant,
    mutants_of,
)

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# As shipped but for its end: see test_the_shipped_scheduler_of_sd15_keeps_the_noise_of_timestep_0.
ENDS_CLEAN = {**BETAS, "steps_offset": 1, "set_alpha_to_one": True}


def ddim(**settings: Any) -> Callable[[], Any]:
    return lambda: diffusers.DDIMScheduler(**ENDS_CLEAN, clip_sample=False, **settings)


def read(args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor) -> tuple[Tensor, Tensor]:
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return args[0], timestep.long().expand(len(args[0]))


def with_parts(parts: Callable[[], dict[str, Any]], **others: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**parts(), **{name: make() for name, make in others.items()}}


SD15 = Case(
    family=get_family("sd15"),  # type: ignore[arg-type]
    parts=sd15.PARTS["sd15"],
    read=read,
    samplers=(
        Sampler(make=ddim()),
        Sampler(make=lambda: diffusers.PNDMScheduler(**ENDS_CLEAN, skip_prk_steps=True)),
    ),
    network_class={"cross_attention_dim": 768},
)
SDXL = Case(
    family=get_family("sdxl"),  # type: ignore[arg-type]
    parts=sdxl.PARTS["sdxl"],
    read=read,
    network_class={
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
CASES = {
    "sd15": SD15,
    # As Stable Diffusion 2 and some finetunes of XL. PLMS would be inexact: v changes on the way.
    "sd15_v": dataclasses.replace(
        SD15,
        parts=with_parts(SD15.parts, scheduler=ddim(prediction_type="v_prediction")),
        samplers=(Sampler(),),
    ),
    "sdxl": SDXL,
    "pixart": Case(
        family=get_family("pixart"),  # type: ignore[arg-type]
        parts=pixart.PARTS["pixart"],
        read=read,
        # The second half of the channels, a variance, is read by nobody.
        answer=lambda prediction: torch.cat([prediction, torch.full_like(prediction, 9.0)], 1),
        said=lambda output, latents: output[:, : latents.shape[1]],
        network_class={"use_additional_conditions": False, "caption_channels": 4096},
        # The first call: at the second one the timestep is 500, half of the way.
        said_at=0,
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
def test_every_name_gets_a_gradient(case: Case, tmp_path: Path) -> None:
    check_train(case, tmp_path)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_the_tiny_network_has_the_full_ones_kinds_of_names(name: str) -> None:
    check_names(CASES[name])


@every_case
def test_guidance_asks_for_the_prompt_and_the_negative_prompt(case: Case) -> None:
    check_guidance(case)


def changed_batch(key: str, change: Callable[[Tensor], Tensor]) -> tuple[str, Callable[..., Any]]:
    def call(original: Any, model: Any, noisy: Any, timestep: Tensor, batch: Batch) -> Any:
        return original(model, noisy, timestep, {**batch, key: change(batch[key])})

    return "predict", call


def other_half(original: Any, model: Any, noisy: Any, timestep: Tensor, batch: Batch) -> Any:
    kept: list[Tensor] = []
    hook = model.register_forward_hook(lambda m, a, k, out: kept.append(out[0]), with_kwargs=True)
    original(model, noisy, timestep, batch)
    hook.remove()
    return kept[0][:, noisy.shape[1] :]


MORE_MUTANTS: dict[str, dict[str, tuple[str, Callable[..., Any]]]] = {
    "sdxl": {
        "height and width are exchanged": changed_batch("time_ids", lambda t: t.roll(1, dims=1)),
        "the pooled prompt is not passed": changed_batch("pooled", torch.zeros_like),
    },
    "pixart": {"the variance is returned": ("predict", other_half)},
}
ALL_MUTANTS = {
    (name, label): change
    for name, case in CASES.items()
    if name != "sd15_v"  # its call is that of sd15
    for label, change in {**mutants_of(case), **MORE_MUTANTS.get(name, {})}.items()
}


@pytest.mark.parametrize(("name", "label"), ALL_MUTANTS)
def test_a_family_that_was_changed_is_told_from_the_pipeline(name: str, label: str) -> None:
    case = CASES[name]
    check_mutant(case, mutant(case.family, *ALL_MUTANTS[name, label]))


def test_a_vae_with_mean_and_std_of_its_own_is_undone_by_the_pipeline() -> None:
    def vae() -> Any:
        found = SDXL.parts()["vae"]
        found.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[2.0, 0.5, 1.5, 3])
        return found

    check_oracle(dataclasses.replace(SDXL, parts=with_parts(SDXL.parts, vae=vae)))


@torch.no_grad()
def test_the_shipped_scheduler_of_sd15_keeps_the_noise_of_timestep_0() -> None:
    pipeline = make_pipeline(SD15)
    batch = SD15.family.collate(make_samples(SD15, SD15.family, pipeline))
    clean, alphas = batch[LATENTS], pipeline.scheduler.alphas_cumprod
    drawn: list[Tensor] = []

    def knows(sample: Tensor, timestep: Tensor, **_: Any) -> Any:
        kept = alphas[int(timestep)]
        drawn.append((sample - kept.sqrt() * clean) / (1 - kept).sqrt())
        return (drawn[-1],)

    pipeline.unet.forward = knows
    given = {**SD15.family.pipeline_inputs(batch, 1.0), "height": 32, "width": 64}
    generator = torch.Generator().manual_seed(5)
    found = pipeline(
        **given, num_inference_steps=6, output_type="latent", generator=generator
    ).images
    left = alphas[0].sqrt() * clean + (1 - alphas[0]).sqrt() * drawn[0]
    torch.testing.assert_close(found, left, atol=1e-4, rtol=0)
    assert float((found - clean).abs().max()) > 0.05
    # The trainer's own walk ends where there is no noise.
    objective = NoisePrediction(
        predict=lambda model, noisy, timestep, batch: knows(noisy, timestep[0])[0],
        scheduler=dict(pipeline.scheduler.config) | {"_class_name": "PNDMScheduler"},
    )
    walked = objective.generate(pipeline.unet, batch, 5, 6)
    assert walked is not None
    torch.testing.assert_close(walked, clean, atol=1e-4, rtol=0)


def test_decay_does_not_shrink_the_rows_of_pixarts_variance(tmp_path: Path) -> None:
    case = CASES["pixart"]
    model = case.parts()["transformer"]
    batch = case.family.collate(make_samples(case, case.family, make_pipeline(case)))
    rates = {"per_layer_lr": {"enabled": True, "default_lr": 0.01, "unmatched": "default"}}
    plan = spare_from_decay(case.family, model, plan_model(model, rates))
    decays = {name: entry.weight_decay for name, entry in plan.entries.items()}
    assert {name for name, decay in decays.items() if decay == 0.0} == {
        "proj_out.weight",
        "proj_out.bias",
    }
    optimizer = attach(plan, model, lambda groups: torch.optim.AdamW(groups, weight_decay=0.5))
    before = model.proj_out.weight.detach().clone().view(4, 2, 4, -1)
    case.family.objective({}, tmp_path / "transformer").loss(model, batch, [0, 1], 0).backward()
    optimizer.step()
    after = model.proj_out.weight.detach().view(4, 2, 4, -1)
    # Rows are (patch, patch, channel): the network folds (row, column, channel) back to pixels.
    moved = (before.view(4, 8, -1) != after.view(4, 8, -1)).any(-1)
    assert moved[:, :4].all() and not moved[:, 4:].any()


def test_pixarts_first_uploads_and_its_1024_model_are_what_their_files_hold() -> None:
    family = get_family("pixart")
    config = dict(CASES["pixart"].parts()["transformer"].config)
    config |= {"_class_name": "Transformer2DModel", "sample_size": 128, "num_vector_embeds": None}
    del config["use_additional_conditions"]
    family.check_config(config)
    model = family.build(config)
    tiny = CASES["pixart"].parts()["transformer"]
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in tiny.named_parameters()
    }


def test_a_batch_of_equal_prompts_has_no_mask_and_the_pipeline_gets_one() -> None:
    family: Any = get_family("pixart")
    rows = [{"latents": torch.zeros(4, 8, 8), "prompt_embeds": torch.ones(3, 24)}] * 2
    batch = family.collate(rows)
    assert batch[PROMPT_MASK] is None
    longer = family.collate([{**rows[0], "prompt_embeds": torch.ones(5, 24)}] * 2)
    given = family.pipeline_inputs({**batch, "negative": longer}, 4.0)
    assert given["prompt_embeds"].shape == given["negative_prompt_embeds"].shape == (2, 5, 24)
    assert given["prompt_attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert given["negative_prompt_attention_mask"].tolist() == [[1] * 5] * 2


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "SDXL as SD 1.5": ("sd15", "sdxl", {}, "set model_type to sdxl"),
    "SD 1.5 as SDXL": ("sdxl", "sd15", {}, "set model_type to sd15"),
    "inpainting": ("sd15", "sd15", {"in_channels": 9}, "in_channels=9"),
    "an upscaler": ("sd15", "sd15", {"num_class_embeds": 1000}, "num_class_embeds=1000"),
    "LCM": ("sdxl", "sdxl", {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
    "the refiner": (
        "sdxl",
        "sdxl",
        {"projection_class_embeddings_input_dim": 5 * 8 + 24},
        "SDXL's refiner",
    ),
    "PixArt-Alpha": ("pixart", "pixart", {"use_additional_conditions": True}, "PixArt-Alpha"),
    "another class": ("pixart", "sd15", {}, "needs a PixArtTransformer2DModel"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_checkpoints_that_need_other_inputs_are_refused(what: str) -> None:
    model_type, other, keys, message = REFUSED[what]
    network = CASES[other].parts()[CASES[other].family.subfolder]
    shipped = dict(network.config) | {"_class_name": type(network).__name__}
    get_family(other).check_config(shipped)
    with pytest.raises(ModelSourceError, match=message):
        get_family(model_type).check_config(shipped | keys)
