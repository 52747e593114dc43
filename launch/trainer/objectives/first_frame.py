"""Flow matching for clips, some of which have their first frame given: image-to-video training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.data.base import LATENTS, Batch
from launch.trainer.objectives.flow import FlowMatching, make_flow_batch
from launch.trainer.seeds import FIRST_FRAME_STREAM, mix_seed

FIRST_FRAME = "first_frame"
"""Field of a batch: (B,) bool, whether a sample's first latent frame is given. Missing: of none."""
_SEEDS = 1 << 63
"""``mix_seed`` returns whole numbers below it."""


@dataclass(frozen=True, kw_only=True)
class FirstFrameFlow(FlowMatching):
    """Predicts the velocity of clips; of some of them the first frame is not noised.

    The family tells the network timestep 0 for the tokens of a frame that is given, and that frame
    counts nothing in the loss.
    """

    first_frame: float = setting(
        fields.number(0.0, 1.0),
        default=0.0,
        doc="Share of the clips that are trained with their first frame given, as in image-to-video"
        " generation; where the model is told a time per token.",
    )

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean squared error of the velocity, in float32; see ``Objective.loss``."""
        latents = batch[LATENTS]
        if self.first_frame == 0 or not isinstance(latents, Tensor):
            return super().loss(model, batch, numbers, seed)
        flow = make_flow_batch(latents, numbers, seed, self.draw_sigma)
        assert isinstance(flow.noisy, Tensor) and isinstance(flow.target, Tensor)
        given = self.draw_given(latents, numbers, seed)
        noisy = with_first(flow.noisy, latents, given)
        velocity = self.predict(model, noisy, flow.timestep, {**batch, FIRST_FRAME: given})
        mean: Tensor = error_without_first(velocity, flow.target, given).mean()
        return mean

    def draw_given(self, latents: Tensor, numbers: Sequence[int], seed: int) -> Tensor:
        """Draw of which samples the first frame is given, (B,) bool: by seed and number alone."""
        drawn = [mix_seed(seed, FIRST_FRAME_STREAM, int(n)) / _SEEDS for n in numbers]
        # Of an image nothing would be left to learn.
        given = [one < self.first_frame and latents.shape[2] > 1 for one in drawn]
        return torch.tensor(given, device=latents.device)


def with_first(noisy: Tensor, clean: Tensor, given: Tensor) -> Tensor:
    """Put the clean first frame into those of (B, C, F, H, W) that have it given."""
    first = torch.where(_per_sample(given), clean[:, :, :1].to(noisy.dtype), noisy[:, :, :1])
    return torch.cat([first, noisy[:, :, 1:]], dim=2)


def error_without_first(found: Tensor, target: Tensor, given: Tensor) -> Tensor:
    """Return each sample's mean squared error (B,) over the frames that were noised."""
    each = (found.float() - target).square()
    kept = torch.ones_like(each)
    kept[:, :, :1] = (~_per_sample(given)).to(kept.dtype)
    return (each * kept).flatten(1).sum(1) / kept.flatten(1).sum(1)


def token_times(timestep: Tensor, given: Tensor, frames: int, tokens: int) -> Tensor:
    """Return a time for each token, (B, frames x tokens): 0 for those of a frame that is given.

    Args:
        timestep: (B,).
        given: (B,) bool.
        frames: Of patches.
        tokens: Of one such frame.
    """
    times = timestep[:, None, None].expand(-1, frames, tokens).clone()
    times[:, 0] = torch.where(given[:, None], torch.zeros_like(times[:, 0]), times[:, 0])
    return times.flatten(1)


def _per_sample(given: Tensor) -> Tensor:
    return given.view(-1, 1, 1, 1, 1)
