"""Noise prediction against diffusers' own schedulers: path, target, weights, and the walk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.data.base import Batch
from launch.trainer.families import get_family
from launch.trainer.objectives.noise import NoisePrediction

SHIPPED = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""As Stable Diffusion 1.5 has it."""
LATENTS = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(3))
MODEL = nn.Identity()


def half(model: nn.Module, noisy: Any, timestep: Tensor, batch: Batch) -> Any:
    return noisy / 2


def noise(predict: Any = half, scheduler: Any = SHIPPED, **settings: Any) -> NoisePrediction:
    return NoisePrediction(predict=predict, scheduler=scheduler, **settings)


def drawn(objective: NoisePrediction, latents: Tensor = LATENTS) -> Tensor:
    """The noise of a batch, solved from the path."""
    made = objective.make_batch(latents, range(len(latents)), 5)
    kept = objective.alphas[made.timestep].view(-1, 1, 1, 1)
    return (made.noisy - kept.sqrt() * latents) / (1 - kept).sqrt()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_latents_and_targets_are_those_of_diffusers(prediction: str) -> None:
    objective = noise(prediction=prediction)
    made = objective.make_batch(LATENTS, range(6), 5)
    own = DDPMScheduler.from_config(SHIPPED)
    added = drawn(objective)
    torch.testing.assert_close(
        made.noisy, own.add_noise(LATENTS, added, made.timestep), atol=1e-5, rtol=1e-5
    )
    wanted = added if prediction == "epsilon" else own.get_velocity(LATENTS, added, made.timestep)
    torch.testing.assert_close(made.target, wanted, atol=2e-5, rtol=1e-4)
    assert made.timestep.dtype == torch.int64


def test_the_prediction_is_the_checkpoints_unless_a_setting_says_another() -> None:
    scheduler = {**SHIPPED, "prediction_type": "v_prediction"}
    found = noise(scheduler=scheduler).make_batch(LATENTS, range(6), 5).target
    assert torch.equal(
        found, noise(prediction="v_prediction").make_batch(LATENTS, range(6), 5).target
    )
    plain = noise().make_batch(LATENTS, range(6), 5).target
    assert torch.equal(
        noise(scheduler=scheduler, prediction="epsilon").make_batch(LATENTS, range(6), 5).target,
        plain,
    )
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_are_those_of_the_formula(gamma: float) -> None:
    snr = compute_snr(DDPMScheduler.from_config(SHIPPED), torch.arange(1000))
    for prediction, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        objective = noise(prediction=prediction, min_snr_gamma=gamma)
        weights = torch.minimum(snr, torch.tensor(gamma)) / divisor
        made = objective.make_batch(LATENTS, range(6), 5)
        torch.testing.assert_close(made.weight, weights[made.timestep])
        each = ((made.noisy / 2 - made.target) ** 2).mean((1, 2, 3))
        loss = objective.loss(MODEL, {"latents": LATENTS}, range(6), 5)
        torch.testing.assert_close(loss, (each * weights[made.timestep]).mean())


def test_the_loss_depends_on_the_sample_numbers_and_not_on_the_microbatches() -> None:
    objective = noise(min_snr_gamma=5.0, noise_offset=0.1)
    whole = objective.loss(MODEL, {"latents": LATENTS}, range(6), 5)
    parts = [
        objective.loss(MODEL, {"latents": LATENTS[i : i + 2]}, range(i, i + 2), 5)
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    other = objective.loss(MODEL, {"latents": LATENTS}, range(6, 12), 5)
    assert not torch.isclose(whole, other)


def test_an_offset_moves_whole_channels_and_leaves_the_noise_below_it() -> None:
    moved = drawn(noise(noise_offset=0.3)) - drawn(noise())
    channels = moved.mean((2, 3), keepdim=True)
    torch.testing.assert_close(moved, channels.expand_as(moved), atol=2e-4, rtol=0)
    assert channels.flatten().unique().numel() == 24
    clips = torch.zeros(2, 4, 3, 1, 1)
    ours, plain = (noise(noise_offset=n).make_batch(clips, [0, 1], 5).target for n in (0.3, 0.0))
    over_frames = (ours - plain)[..., 0, 0]
    torch.testing.assert_close(over_frames, over_frames[:, :, :1].expand(2, 4, 3))
    assert over_frames.abs().min() > 0


def test_timesteps_fill_their_range_and_no_more() -> None:
    objective = noise(first_timestep=3, last_timestep=7)
    clean = torch.zeros(200, 1, 1)
    steps = objective.make_batch(clean, range(200), 0).timestep
    assert set(steps.tolist()) == {3, 4, 5, 6, 7}
    whole = noise().make_batch(torch.zeros(4000, 1, 1), range(4000), 0).timestep
    assert whole.min() == 0 and whole.max() == 999
    assert abs(whole.float().mean().item() - 499.5) < 15


def test_settings_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match=r"objective\.last_timestep=1000: must be below 1000"):
        noise(last_timestep=1000)
    with pytest.raises(ConfigError, match=r"objective\.first_timestep=8: must be at most"):
        noise(first_timestep=8, last_timestep=7)
    with pytest.raises(ModelSourceError, match="FlowMatchEulerDiscreteScheduler, which has no"):
        noise(scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    with pytest.raises(ModelSourceError, match="prediction_type='flow_prediction'"):
        noise(
            scheduler={
                "_class_name": "DPMSolverMultistepScheduler",
                "prediction_type": "flow_prediction",
            }
        )


@pytest.mark.parametrize("made", [DDIMScheduler, EulerDiscreteScheduler, DDPMScheduler])
def test_betas_that_end_in_pure_noise_are_refused_where_noise_is_predicted(made: Any) -> None:
    shipped = dict(made(rescale_betas_zero_snr=True).config)
    shipped["_class_name"] = made.__name__
    with pytest.raises(ConfigError, match=r"prediction='epsilon' with betas of zero terminal SNR"):
        noise(scheduler=shipped)
    objective = noise(scheduler=shipped, prediction="v_prediction")
    assert objective.alphas[-1] < 1e-7
    assert noise(scheduler=shipped, zero_terminal_snr=False).alphas[-1] > 1e-5
    loss = noise(
        scheduler=shipped, prediction="v_prediction", min_snr_gamma=5.0, first_timestep=999
    ).loss(MODEL, {"latents": LATENTS}, range(6), 5)
    assert loss.isfinite()


def test_a_scheduler_without_rescaled_betas_cannot_be_asked_for_them() -> None:
    with pytest.raises(ConfigError, match=r"zero_terminal_snr=true: PNDMScheduler"):
        noise(zero_terminal_snr=True, prediction="v_prediction")
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        noise(scheduler={**SHIPPED, "_class_name": "DDIMScheduler"}, zero_terminal_snr=True)


class Knows:
    """A predictor that is told the clean latents."""

    def __init__(self, clean: Tensor, prediction: str):
        self.clean, self.prediction, self.steps = clean, prediction, list[int]()

    def __call__(self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        self.steps.append(int(timestep[0]))
        kept = DDPMScheduler.from_config(SHIPPED).alphas_cumprod[timestep].view(-1, 1, 1, 1)
        found = (noisy - kept.sqrt() * self.clean) / (1 - kept).sqrt()
        if self.prediction == "epsilon":
            return found
        return kept.sqrt() * found - (1 - kept).sqrt() * self.clean


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_walk_of_a_perfect_predictor_ends_at_the_clean_latents(
    prediction: str, steps: int
) -> None:
    knows = Knows(LATENTS, prediction)
    found = noise(knows, prediction=prediction).generate(MODEL, {"latents": LATENTS}, 5, steps)
    assert found is not None and len(knows.steps) == steps and knows.steps[0] == 999
    torch.testing.assert_close(found, LATENTS, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_walk_is_that_of_diffusers_ddim_where_its_steps_are_whole(prediction: str) -> None:
    def wave(model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Batch) -> Tensor:
        return (noisy + timestep.view(-1, 1, 1, 1) / 500).sin()

    found = noise(wave, prediction=prediction).generate(MODEL, {"latents": LATENTS}, 5, 20)
    again = noise(wave, prediction=prediction).generate(MODEL, {"latents": LATENTS}, 5, 20)
    own = DDIMScheduler.from_config(
        SHIPPED,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type=prediction,
    )
    own.set_timesteps(20)
    from launch.trainer.objectives.flow import starting_noise

    latents = starting_noise(LATENTS.shape, 5)
    for step in own.timesteps:
        latents = own.step(wave(MODEL, latents, step.expand(6), {}), step, latents).prev_sample
    assert found is not None and again is not None
    torch.testing.assert_close(found, latents, atol=1e-4, rtol=1e-4)
    assert torch.equal(found, again)


def test_a_walk_takes_no_more_steps_than_there_are_timesteps() -> None:
    with pytest.raises(
        ConfigError, match=r"samples\.steps=1001: must be an integer in \[1, 1000\]"
    ):
        noise().generate(MODEL, {"latents": LATENTS}, 5, 1001)


@pytest.mark.parametrize("model_type", ["sd15", "sdxl", "pixart"])
def test_betas_are_those_of_the_scheduler_beside_the_network(
    model_type: str, tmp_path: Path
) -> None:
    family: Any = get_family(model_type)
    folder = tmp_path / family.subfolder
    alone = family.objective({}, folder)
    assert f"no {tmp_path}" in alone.note and "epsilon" in alone.note
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SHIPPED))
    beside = family.objective({}, folder)
    assert beside.note is None
    assert torch.equal(beside.alphas, PNDMScheduler.from_config(SHIPPED).alphas_cumprod)
    ends = {"sd15": 0.0047, "sdxl": 0.0047, "pixart": 4e-5}
    assert float(alone.alphas[-1]) == pytest.approx(ends[model_type], rel=0.02)


def test_a_pipeline_samples_by_what_is_trained() -> None:
    class Pipeline:
        scheduler: Any = EulerDiscreteScheduler.from_config({**SHIPPED, "_class_name": ""})

    pipeline, shipped = Pipeline(), {**SHIPPED, "_class_name": "EulerDiscreteScheduler"}
    noise(scheduler=shipped).fit_pipeline(pipeline)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert not pipeline.scheduler.config.rescale_betas_zero_snr
    objective = noise(scheduler=shipped, prediction="v_prediction", zero_terminal_snr=True)
    objective.fit_pipeline(pipeline)
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, objective.alphas)
    pipeline.scheduler.set_timesteps(5)
    assert int(pipeline.scheduler.timesteps[0]) == 999
