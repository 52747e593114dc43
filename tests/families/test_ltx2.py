"""LTX-2.0, 2.3 and 2.5 say what their real pipeline says: see tests/support/oracle.py."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import Origin
from launch.trainer.families.ltx2 import (
    AUDIO,
    AUDIO_LATENTS,
    AUDIO_PROMPT_EMBEDS,
    FPS,
    HAS_AUDIO,
    LTX2,
    SIZES,
    VIDEO,
    SilentLTX2,
)
from launch.trainer.families.sound import fitted, log_mel
from launch.trainer.objectives.flow import make_flow_batch
from launch.trainer.objectives.streams import AudioVideoFlow, make_streams
from launch.trainer.tiny.ltx2 import PARTS, V2_3, V2_5
from launch.trainer.tiny.text import text_parts
from tests.support import oracle

FRAME_RATE, SOUNDS = 12.0, 19
"""9 frames take 0.75 s, which are 19 latents of sound."""


class _Sound:
    """A family, its samples with a sound beside the pixels: the harness gives pixels alone."""

    def encode_pixels(self: Any, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        seed = int(1000 * pixels.abs().mean())
        sound = oracle.noise(seed, SOUNDS, 4)
        parent: Any = super()
        clip = parent.encode_pixels(pipeline, pixels)
        return {**clip, AUDIO_LATENTS: sound, FPS: torch.tensor(FRAME_RATE)}


class _Sounding(_Sound, LTX2):
    pass


class _Silent(_Sound, SilentLTX2):
    pass


def read(args: Any, kwargs: Mapping[str, Any], latents: Any) -> tuple[Any, Tensor]:
    size = latents[VIDEO].shape[2:]
    video = kwargs["hidden_states"].transpose(1, 2).unflatten(2, size)
    return {VIDEO: video, AUDIO: kwargs["audio_hidden_states"]}, kwargs["timestep"]


def answer(prediction: Any) -> tuple[Tensor, Tensor]:
    return prediction[VIDEO].flatten(2).transpose(1, 2), prediction[AUDIO]


def said(output: Any, latents: Any) -> Any:
    video = output[0].transpose(1, 2).unflatten(2, latents[VIDEO].shape[2:])
    return {VIDEO: video, AUDIO: output[1]}


def case(parts: str, **version: Any) -> oracle.Case:
    return oracle.Case(
        family=_Sounding(),
        parts=PARTS[parts],
        read=read,
        answer=answer,
        said=said,
        whole_answer=True,
        pixels=(9, 32, 64),
        video_vae=True,
        lengths=(4, 4),
        network_class={"rope_type": "split", **version},
    )


CASES = {"2.0": case("ltx2"), "2.3": case("ltx2_3", **V2_3), "2.5": case("ltx2_5", **V2_5)}


@pytest.mark.parametrize("version", CASES)
def test_a_perfect_network_gives_the_picture_back(version: str) -> None:
    oracle.check_oracle(CASES[version])


@pytest.mark.parametrize("version", CASES)
def test_the_training_call_is_the_pipelines_call(version: str) -> None:
    oracle.check_call(CASES[version])


@pytest.mark.parametrize("version", CASES)
def test_guidance_asks_for_both_prompts(version: str) -> None:
    oracle.check_guidance(CASES[version])


@pytest.mark.parametrize("version", CASES)
def test_exactly_the_named_parameters_get_no_gradient(version: str, tmp_path: Path) -> None:
    oracle.check_train(CASES[version], tmp_path)


@pytest.mark.parametrize("version", CASES)
def test_the_tiny_network_has_the_names_of_the_full_one(version: str) -> None:
    oracle.check_names(CASES[version])


def other_rate(original: Any, model: Any, noisy: Any, time: Tensor, batch: Any) -> Any:
    return original(model, noisy, time, {**batch, FPS: 24.0})


def crossed(original: Any, model: Any, noisy: Any, time: Tensor, batch: Any) -> Any:
    """The sound's prompt is not passed."""
    sound = torch.zeros_like(batch[AUDIO_PROMPT_EMBEDS])
    return original(model, noisy, time, {**batch, AUDIO_PROMPT_EMBEDS: sound})


def frames_last(original: Any, model: Any, noisy: Any, time: Tensor, batch: Any) -> Any:
    """Tokens in the order (H, W, F)."""
    frames = noisy[VIDEO].shape[2]

    def call(hidden_states: Tensor, **kwargs: Any) -> Any:
        turned = hidden_states.unflatten(1, (frames, -1)).transpose(1, 2).flatten(1, 2)
        video, audio = model(hidden_states=turned, **kwargs)
        return video.unflatten(1, (-1, frames)).transpose(1, 2).flatten(1, 2), audio

    return original(call_like(model, call), noisy, time, batch)


def call_like(model: Any, call: Any) -> Any:
    changed = torch.nn.Module()
    changed.forward, changed.config = call, model.config
    return changed


MUTANTS = {
    "another frame rate": ("predict", other_rate),
    "the sound has no prompt": ("predict", crossed),
    "tokens are in another order": ("predict", frames_last),
}


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_a_family_changed_on_purpose_is_found(version: str) -> None:
    found = CASES[version]
    for method, change in {**oracle.mutants_of(found), **MUTANTS}.values():
        oracle.check_mutant(found, oracle.mutant(found.family, method, change))


def silent(version: str) -> oracle.Case:
    return dataclasses.replace(CASES[version], family=_Silent())


@pytest.mark.parametrize("version", CASES)
def test_without_sound_exactly_the_named_parameters_get_no_gradient(
    version: str, tmp_path: Path
) -> None:
    found = silent(version)
    oracle.check_train(found, tmp_path, audio=False)
    network = found.parts()["transformer"]
    counted = {"2.0": 133, "2.3": 153, "2.5": 154}
    assert len(found.family.without_gradient(network.config)) == counted[version]


def test_without_sound_the_clip_is_what_the_network_makes_of_it_apart_from_the_sound() -> None:
    found = silent("2.3")
    pipeline = oracle.make_pipeline(found)
    batch = found.family.collate(oracle.make_samples(found, found.family, pipeline))
    time = torch.tensor([300.0, 800.0])
    with torch.no_grad():
        alone = found.family.predict(pipeline.transformer, batch["latents"], time, batch)
    heard = CASES["2.3"].family.collate(oracle.make_samples(found, CASES["2.3"].family, pipeline))

    def apart(**kwargs: Any) -> Any:
        return pipeline.transformer(**kwargs, isolate_modalities=True)

    with torch.no_grad():
        wanted = LTX2().predict(
            call_like(pipeline.transformer, apart), heard["latents"], time, heard
        )
    assert oracle.apart(alone, wanted[VIDEO]) < 1e-5


def test_the_setting_chooses_the_family_and_its_lora_targets() -> None:
    assert type(get_family("ltx2", {"audio": False})) is SilentLTX2
    assert type(get_family("ltx2", {})) is type(get_family("ltx2")) is LTX2
    names = [name for name, _ in PARTS["ltx2_3"]()["transformer"].named_modules()]
    targets = SilentLTX2().lora_targets({})
    found = [name for name in names if re.fullmatch(targets, name)]
    # Two attentions of 4 projections and a feed-forward of 2, in 2 blocks.
    assert len(found) == 20 and not any("audio" in name for name in found)


def samples_of(**changes: Any) -> list[dict[str, Any]]:
    both = []
    for number in range(2):
        sample = {
            "latents": oracle.noise(number, 4, 3, 2, 4),
            AUDIO_LATENTS: oracle.noise(10 + number, SOUNDS, 4),
            "prompt_embeds": oracle.noise(20 + number, 4, 16),
            AUDIO_PROMPT_EMBEDS: oracle.noise(30 + number, 4, 16),
            FPS: torch.tensor(FRAME_RATE),
        }
        both.append({**sample, **{k: v[number] for k, v in changes.items()}})
    return both


def test_a_silent_clip_teaches_the_network_no_sound() -> None:
    """Its loss is the mean squared error of the clip alone; another sound changes nothing of it but
    what the clip sees of the noise."""
    family, truth = LTX2(), {}
    heard = torch.tensor([True, False])

    def predict(model: Any, noisy: Any, timestep: Tensor, batch: Any) -> Any:
        truth.update(noisy=noisy, timestep=timestep)
        return {VIDEO: torch.zeros_like(noisy[VIDEO]), AUDIO: torch.zeros_like(noisy[AUDIO])}

    batch = family.collate(samples_of(**{HAS_AUDIO: heard}))
    objective = AudioVideoFlow(predict=predict)
    loss = objective.loss(torch.nn.Identity(), batch, [4, 5], 0)
    flow = make_streams(batch["latents"], [4, 5], 0, objective.draw_sigma)
    video = flow.target[VIDEO].square().flatten(1).mean(1)
    sound = flow.target[AUDIO].square().flatten(1).mean(1)
    assert float(loss) == pytest.approx(float((video[0] + sound[0] + video[1]) / 2), rel=1e-6)


def test_both_streams_have_one_share_of_noise_and_noise_of_their_own() -> None:
    latents = LTX2().collate(samples_of())["latents"]
    draw = AudioVideoFlow(predict=lambda *_: None).draw_sigma
    whole = make_streams(latents, [6, 7], 3, draw)
    alone = make_flow_batch(latents[VIDEO], [6, 7], 3, draw)
    assert torch.equal(whole.noisy[VIDEO], alone.noisy)
    share = whole.sigma.view(-1, 1, 1)
    noise = whole.target[AUDIO] + latents[AUDIO]
    assert torch.allclose(whole.noisy[AUDIO], (1 - share) * latents[AUDIO] + share * noise)
    # A rank that holds the second sample alone draws the same for it.
    half = make_streams({name: one[1:] for name, one in latents.items()}, [7], 3, draw)
    for name in latents:
        assert torch.equal(half.noisy[name][0], whole.noisy[name][1])
    # The first numbers of both streams come from different generators.
    clip = whole.target[VIDEO] + latents[VIDEO]
    assert (clip.flatten(1)[:, :20] - noise.flatten(1)[:, :20]).abs().min() > 1e-4


def test_the_picture_of_the_clip_comes_from_walking_both_streams() -> None:
    latents = LTX2().collate(samples_of())["latents"]

    def toward(model: Any, noisy: Any, timestep: Tensor, batch: Any) -> Any:
        share = timestep / 1000
        return {n: (x - latents[n]) / share.view(-1, *[1] * (x.ndim - 1)) for n, x in noisy.items()}

    made = AudioVideoFlow(predict=toward).generate(torch.nn.Identity(), {"latents": latents}, 0, 4)
    assert oracle.apart(made, latents[VIDEO]) < 1e-5


def test_shift_grows_with_the_tokens_of_the_clip_as_in_the_shipped_scheduler() -> None:
    # exp(0.95) at 1024 tokens, exp(2.05) at 4096: the published line.
    assert SIZES.shift((128, 4, 16, 16)) == pytest.approx(2.585709659)
    assert SIZES.shift((128, 16, 16, 16)) == pytest.approx(7.767901106)


def test_clips_of_several_frame_rates_are_refused_in_one_batch() -> None:
    rates = {FPS: torch.tensor([24.0, 25.0])}
    with pytest.raises(ModelSourceError, match=r"24\.0, 25\.0 frames per second.*micro_batch=1"):
        LTX2().collate(samples_of(**rates))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({AUDIO_LATENTS: None}, "audio_latents is missing"),
        ({AUDIO_PROMPT_EMBEDS: torch.zeros(4, 17)}, r"audio_prompt_embeds has shape .*\(L, 16\)"),
        ({FPS: torch.zeros(1)}, r"fps has shape \(1,\)"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    config = PARTS["ltx2"]()["transformer"].config
    sample = samples_of()[0]
    LTX2().check_sample(config, sample)
    changed = {k: v for k, v in {**sample, **change}.items() if v is not None}
    with pytest.raises(ModelSourceError, match=message):
        LTX2().check_sample(config, changed)
    SilentLTX2().check_sample(config, {k: v for k, v in sample.items() if k != AUDIO_LATENTS})


@torch.no_grad()
def test_a_sound_becomes_as_many_latents_as_the_pipeline_makes_for_the_clip() -> None:
    found, family = CASES["2.0"], LTX2()
    pipeline = oracle.make_pipeline(found)
    clip = oracle.make_pixels(found)[0]

    def coded_of(sound: Tensor | None, rate: int) -> Mapping[str, Tensor]:
        sizes = {"size": (32, 64), "corner": (0, 0), "fps": FRAME_RATE}
        return family.encode_source(pipeline, clip, Origin(**sizes, sound=sound, rate=rate))

    for samples in (8000, 12000, 20000):
        sound = oracle.noise(1, 1, samples).clamp(-1, 1)
        coded = coded_of(sound, 16000)
        assert coded[AUDIO_LATENTS].shape == (SOUNDS, 4) and bool(coded[HAS_AUDIO])
        assert float(coded[FPS]) == FRAME_RATE
    family.check_sample(
        pipeline.transformer.config,
        {**coded, "prompt_embeds": torch.zeros(4, 16), AUDIO_PROMPT_EMBEDS: torch.zeros(4, 16)},
    )
    # The inverse of what the pipeline does before it decodes.
    vae = pipeline.audio_vae
    mel = log_mel(fitted(sound.T, 12000).T, 16000, bins=8, hop=160)
    with torch.no_grad():
        raw = vae.encode(mel[None]).latent_dist.mode()
    back = pipeline._denormalize_audio_latents(
        coded[AUDIO_LATENTS][None], vae.latents_mean, vae.latents_std
    )
    back = pipeline._unpack_audio_latents(back, SOUNDS, num_mel_bins=2)
    assert oracle.apart(back, raw[:, :, :SOUNDS]) < 1e-5
    nothing = coded_of(None, 0)
    assert nothing[AUDIO_LATENTS].shape == (SOUNDS, 4) and not bool(nothing[HAS_AUDIO])
    with pytest.raises(ModelSourceError, match="44100 samples per second.*ffmpeg.*-ar 16000"):
        coded_of(sound, 44100)
    with pytest.raises(ModelSourceError, match="how many frames a second"):
        family.encode_source(pipeline, clip, Origin(size=(32, 64), corner=(0, 0)))


def test_the_spectrogram_is_the_logarithm_of_slaneys_triangles_over_magnitudes() -> None:
    time = torch.arange(8000) / 16000
    sound = 0.5 * torch.sin(2 * math.pi * 1000 * time)[None]
    found = log_mel(sound, 16000, bins=64, hop=160)
    assert found.shape == (2, 51, 64) and torch.equal(found[0], found[1])
    window = torch.hann_window(1024)
    lines = torch.stft(sound[0], 1024, 160, window=window, return_complex=True).abs().T
    # Slaney's scale is linear below 1 kHz, where 1 kHz is the 15th mark, and then 27 steps to
    # 6.4 kHz; each triangle has area 1.
    step = math.log(6.4) / 27
    marks = torch.linspace(0, 15 + math.log(8) / step, 66)
    hertz = torch.where(marks < 15, marks * 200 / 3, 1000 * torch.exp((marks - 15) * step))
    bins = torch.arange(513) * 16000 / 1024
    rising = (bins[:, None] - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    falling = (hertz[2:] - bins[:, None]) / (hertz[2:] - hertz[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0) * 2 / (hertz[2:] - hertz[:-2])
    wanted = (lines @ triangles).clamp(min=1e-5).log()
    assert oracle.apart(found[0], wanted) < 2e-2


def test_cached_prompts_are_what_the_pipeline_makes_of_the_captions() -> None:
    oracle.check_text(CASES["2.3"], ("a cat purrs", "rain"), **text_parts("ltx2"))
