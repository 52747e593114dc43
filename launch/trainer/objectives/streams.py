"""Flow matching over several streams, such as a clip and its sound: one share of noise for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.data.base import LATENTS, Batch
from launch.trainer.objectives.first_frame import (
    FIRST_FRAME,
    FirstFrameFlow,
    error_without_first,
    with_first,
)
from launch.trainer.objectives.flow import FlowBatch, make_flow_batch, sample
from launch.trainer.objectives.sigma import TIMESTEPS, DrawSigma
from launch.trainer.seeds import EXTRA_STREAM, mix_seed

WEIGHTS = "stream_weights"
"""Field of a batch: {stream: (B,)}, what a sample's loss in that stream counts; 1 where missing."""


@dataclass(frozen=True, kw_only=True)
class AudioVideoFlow(FirstFrameFlow):
    """Predicts the velocity of every stream. Satisfies ``Objective``.

    With one stream, whose latents are no mapping, it is ``FirstFrameFlow``.
    """

    audio: bool = setting(
        fields.boolean,
        default=True,
        doc="Train the sound too. `false`: the clip alone, as if the model had no sound.",
    )

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean over samples of the sum of their streams' errors, in float32."""
        latents = batch[LATENTS]
        if not isinstance(latents, Mapping):
            return super().loss(model, batch, numbers, seed)
        flow = make_streams(latents, numbers, seed, self.draw_sigma)
        clip, given = next(iter(latents)), None
        noisy, told = flow.noisy, batch
        if self.first_frame > 0:
            given = self.draw_given(latents[clip], numbers, seed)
            noisy = {**noisy, clip: with_first(noisy[clip], latents[clip], given)}
            told = {**batch, FIRST_FRAME: given}
        found = self.predict(model, noisy, flow.timestep, told)
        weights, total = batch.get(WEIGHTS, {}), torch.zeros_like(flow.sigma)
        for name, target in flow.target.items():
            each = mse_loss(found[name].float(), target, reduction="none").flatten(1).mean(1)
            if given is not None and name == clip:
                each = error_without_first(found[name], target, given)
            # A weight of 0 and not a part left out: every step has the same graph, so that ranks
            # with and without sound reduce the same gradients.
            total = total + each * weights.get(name, 1.0)
        mean: Tensor = total.mean()
        return mean

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Walk from noise to the latents of all streams; return those of the first."""
        latents = batch[LATENTS]
        if not isinstance(latents, Mapping):
            return super().generate(model, batch, seed, steps)
        count = len(next(iter(latents.values())))
        sizes = {name: one.shape for name, one in latents.items()}
        widths = [prod(size[1:]) for size in sizes.values()]

        def split(joined: Tensor) -> dict[str, Tensor]:
            parts = torch.split(joined, widths, dim=1)
            return {n: p.view(size) for p, (n, size) in zip(parts, sizes.items(), strict=True)}

        def velocity(joined: Tensor, timestep: Tensor) -> Tensor:
            found = self.predict(model, split(joined), timestep, batch)
            return torch.cat([found[name].flatten(1) for name in sizes], dim=1)

        # Side by side in one row, because Euler's steps are the same for all streams.
        device = next(iter(latents.values())).device
        shape = (count, sum(widths))
        made = sample(velocity, shape, seed, steps, device, shift=self.sample_shift)
        return next(iter(split(made).values()))


@dataclass(frozen=True, kw_only=True)
class StreamsBatch:
    """One batch on the path from data to noise; every stream of a sample has the same sigma."""

    noisy: dict[str, Tensor]
    target: dict[str, Tensor]
    """The velocities ``noise - x``, float32."""
    sigma: Tensor
    """(B,) float32 in (0, 1)."""
    timestep: Tensor
    """(B,) float32 in (0, 1000)."""


def make_streams(
    latents: Mapping[str, Tensor], numbers: Sequence[int], seed: int, draw_sigma: DrawSigma
) -> StreamsBatch:
    """Put each sample at its own random place on the path to noise, with all its streams.

    Args:
        latents: Clean data by stream, (B, ...) each. The first decides the share of noise, and its
            noise is what it would be alone.
        numbers: B integers, ``step * global_batch + position``; they alone decide the noise.
        seed: Of the run.
        draw_sigma: Of one sample.
    """
    first, *others = latents
    flow: FlowBatch = make_flow_batch(latents[first], numbers, seed, draw_sigma)
    assert isinstance(flow.noisy, Tensor) and isinstance(flow.target, Tensor)
    noisy, target = {first: flow.noisy}, {first: flow.target}
    for place, name in enumerate(others):
        clean = latents[name].float()
        drawn = []
        for number in numbers:
            own = mix_seed(seed, EXTRA_STREAM, place, int(number))
            generator = torch.Generator().manual_seed(own)
            drawn.append(torch.randn(clean.shape[1:], generator=generator))
        noise = torch.stack(drawn).to(clean.device)
        share = flow.sigma.view(-1, *[1] * (clean.ndim - 1))
        noisy[name] = (1 - share) * clean + share * noise
        target[name] = noise - clean
    return StreamsBatch(
        noisy=noisy, target=target, sigma=flow.sigma, timestep=flow.sigma * TIMESTEPS
    )
