"""``objective.first_frame``: a clip is trained with its first frame given, as the image-to-video
pipelines of the same networks call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr.errors import ConfigError
from launch.trainer.families.ltx2 import AUDIO, AUDIO_PROMPT_EMBEDS, FPS, LTX2, VIDEO
from launch.trainer.families.video import frame_image
from launch.trainer.families.wan22 import Wan22
from launch.trainer.objectives.first_frame import FIRST_FRAME, FirstFrameFlow, token_times
from launch.trainer.objectives.flow import make_flow_batch
from launch.trainer.objectives.streams import AudioVideoFlow, make_streams
from launch.trainer.tiny import ltx2, wan
from tests.support import oracle

GIVEN = {FIRST_FRAME: torch.tensor([True])}
FRAME_RATE = 12.0


def clip_of(case: oracle.Case) -> Tensor:
    """A clip in whole levels of brightness, as a picture file holds it."""
    clip = oracle.make_pixels(case)[0]
    return ((clip + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def test_wans_dense_model_is_called_as_its_image_to_video_pipeline_does() -> None:
    class Family(Wan22):
        pipeline_class = "WanImageToVideoPipeline"

    case = oracle.Case(
        family=Family(),
        parts=wan.PARTS["wan22_5b"],
        read=lambda *_: None,
        pixels=(9, 32, 64),
        video_vae=True,
    )
    pipeline, clip = oracle.make_pipeline(case), clip_of(case)
    latents = case.family.encode_pixels(pipeline, clip)["latents"]
    batch = {"prompt_embeds": oracle.noise(1, 1, 512, 16), **GIVEN}
    with oracle.recorded(case, pipeline) as calls:
        pipeline(
            image=frame_image(clip[:, 0]),
            prompt_embeds=batch["prompt_embeds"],
            **case.family.pixel_size(pipeline, latents),
            num_inference_steps=3,
            guidance_scale=1.0,
            output_type="latent",
        )
    noisy, rows = calls[1].kwargs["hidden_states"], calls[1].kwargs["timestep"]
    # What is given is what the cache holds of the clip: the VAE does not look ahead.
    assert oracle.apart(noisy[0, :, 0], latents[:, 0]) < 1e-5
    timestep = rows[:, -1].float()
    found = case.family.predict(pipeline.transformer, noisy, timestep, batch)
    assert oracle.apart(found, calls[1].output[0]) < 1e-5
    plain = {name: value for name, value in batch.items() if name != FIRST_FRAME}
    other = case.family.predict(pipeline.transformer, noisy, timestep, plain)
    assert oracle.apart(other, calls[1].output[0]) > 1e-3


@pytest.mark.parametrize("version", ["ltx2", "ltx2_3"])
@torch.no_grad()
def test_ltx2_is_called_as_its_image_to_video_pipeline_does(version: str) -> None:
    class Family(LTX2):
        pipeline_class = "LTX2ImageToVideoPipeline"

    case = oracle.Case(
        family=Family(),
        parts=ltx2.PARTS[version],
        read=lambda *_: None,
        pixels=(9, 32, 64),
        video_vae=True,
    )
    pipeline, clip = oracle.make_pipeline(case), clip_of(case)
    # As published: this pipeline, unlike its text-to-video one, takes no notice of another factor.
    pipeline.vae.register_to_config(scaling_factor=1.0)
    latents = case.family.encode_pixels(pipeline, clip)["latents"]
    widths = case.family.layout(pipeline.transformer.config)
    video, audio = (int(widths[name][1]) for name in ("prompt_embeds", AUDIO_PROMPT_EMBEDS))
    batch = {
        "prompt_embeds": oracle.noise(1, 1, 4, video),
        AUDIO_PROMPT_EMBEDS: oracle.noise(2, 1, 4, audio),
        FPS: FRAME_RATE,
        **GIVEN,
    }
    with case.family.pipeline_with(pipeline, batch), oracle.recorded(case, pipeline) as calls:
        pipeline(
            image=frame_image(clip[:, 0]),
            image_crf=0,
            **case.family.pipeline_inputs(batch, 1.0),
            **case.family.pixel_size(pipeline, latents),
            use_cross_timestep=version != "ltx2",
            num_inference_steps=3,
            output_type="latent",
        )
    told, output = calls[1].kwargs, calls[1].output
    size = latents.shape[1:]
    noisy = told["hidden_states"].transpose(1, 2).unflatten(2, size)
    assert oracle.apart(noisy[0, :, 0], latents[:, 0]) < 1e-5
    both = {VIDEO: noisy, AUDIO: told["audio_hidden_states"]}
    timestep = told["audio_timestep"].float().flatten()[:1]
    found = case.family.predict(pipeline.transformer, both, timestep, batch)
    wanted = output[0].transpose(1, 2).unflatten(2, size)
    assert oracle.apart(found, {VIDEO: wanted, AUDIO: output[1]}) < 1e-5


def test_times_are_0_for_the_tokens_of_a_given_frame_alone() -> None:
    found = token_times(torch.tensor([300.0, 800.0]), torch.tensor([True, False]), 3, 2)
    assert found.tolist() == [[0, 0, 300, 300, 300, 300], [800] * 6]


def half(found: list[Any]) -> Any:
    """A prediction of zeros that notes what the network was given."""

    def predict(model: nn.Module, noisy: Any, timestep: Tensor, batch: Any) -> Any:
        found.append((noisy, batch[FIRST_FRAME]))
        if isinstance(noisy, Tensor):
            return torch.zeros_like(noisy)
        return {name: torch.zeros_like(one) for name, one in noisy.items()}

    return predict


def test_a_given_frame_is_clean_and_counts_nothing_in_the_loss() -> None:
    latents, seen, numbers = oracle.noise(1, 8, 4, 3, 2, 2), [], list(range(8))
    objective = FirstFrameFlow(predict=half(seen), first_frame=0.5)
    loss = objective.loss(nn.Identity(), {"latents": latents}, numbers, 0)
    (noisy, given), flow = seen[0], make_flow_batch(latents, numbers, 0, objective.draw_sigma)
    assert 0 < int(given.sum()) < 8
    each = []
    for row in range(8):
        start = 1 if given[row] else 0
        assert torch.equal(noisy[row, :, start:], flow.noisy[row][:, start:])
        assert torch.equal(noisy[row, :, :start], latents[row, :, :start])
        each.append(flow.target[row][:, start:].square().mean())
    assert float(loss) == pytest.approx(float(torch.stack(each).mean()), rel=1e-6)
    # A rank that holds two of them draws the same for those two.
    objective.loss(nn.Identity(), {"latents": latents[4:6]}, [4, 5], 0)
    assert seen[1][1].tolist() == given[4:6].tolist()
    assert not objective.draw_given(latents[:, :, :1], numbers, 0).any(), "an image has one frame"


def test_the_share_of_clips_is_the_one_that_was_asked_for() -> None:
    objective = FirstFrameFlow(predict=half([]), first_frame=0.1)
    latents = torch.zeros(4000, 1, 2, 1, 1)
    found = int(objective.draw_given(latents, range(4000), 3).sum())
    # Three standard deviations of 4,000 draws at 0.1.
    assert abs(found - 400) < 57


def test_the_sound_counts_whole_where_a_first_frame_is_given() -> None:
    latents = {VIDEO: oracle.noise(1, 2, 4, 3, 2, 2), AUDIO: oracle.noise(2, 2, 5, 4)}
    seen: list[Any] = []
    objective = AudioVideoFlow(predict=half(seen), first_frame=1.0)
    loss = objective.loss(nn.Identity(), {"latents": latents}, [0, 1], 0)
    flow = make_streams(latents, [0, 1], 0, objective.draw_sigma)
    video = flow.target[VIDEO][:, :, 1:].square().mean()
    sound = flow.target[AUDIO].square().mean()
    assert float(loss) == pytest.approx(float(video + sound), rel=1e-6)
    noisy = seen[0][0]
    assert torch.equal(noisy[VIDEO][:, :, :1], latents[VIDEO][:, :, :1])
    assert torch.equal(noisy[AUDIO], flow.noisy[AUDIO])


def test_a_model_that_is_told_one_time_per_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective\.first_frame=0\.1.*one time per clip"):
        Wan22().objective({"first_frame": 0.1}, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"expand_timesteps": True}))
    found: Any = Wan22().objective({"first_frame": 0.1}, tmp_path / "transformer")
    assert found.first_frame == 0.1
