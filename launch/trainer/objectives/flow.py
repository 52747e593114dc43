"""Flow matching: noise, timesteps and targets, and a plain Euler sampler.

The path is the straight line ``x_sigma = (1 - sigma) * x + sigma * noise`` and the model learns its
velocity ``noise - x``. Everything random about a training sample derives from (seed, sample number)
and nothing else, where the sample number is ``step * global_batch + position``: the same run on 1
or N ranks sees the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.data.base import LATENTS, Batch
from launch.trainer.objectives.sigma import TIMESTEPS, DrawSigma, SigmaDistribution, bend
from launch.trainer.seeds import SAMPLE_STREAM, TRAIN_STREAM, mix_seed

Predict = Callable[[nn.Module, Any, Tensor, Batch], Any]
"""(model, noisy, timestep (B,), batch) -> velocity. Noisy and velocity have the shape of the
latents: (B, ...) stacked, or a list of B tensors of any shapes."""


@dataclass(frozen=True, kw_only=True)
class FlowMatching(SigmaDistribution):
    """Predicts the velocity of the latents. Satisfies ``Objective``."""

    predict: Predict
    """The family's call."""
    sample_shift: float = setting(
        fields.number(0.0, open_low=True),
        default=1.0,
        shown="the family's own",
        doc="The same for the steps of the picture.",
    )

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean squared error of the velocity, in float32; see ``Objective.loss``."""
        flow = make_flow_batch(batch[LATENTS], numbers, seed, self.draw_sigma)
        velocity = self.predict(model, flow.noisy, flow.timestep, batch)
        if isinstance(flow.target, Tensor):
            return mse_loss(velocity.float(), flow.target)
        # Samples of different sizes count alike. One mean over all elements would make a sample's
        # weight depend on which others share its microbatch.
        each = []
        for found, wanted in zip(velocity, flow.target, strict=True):
            each.append(mse_loss(found.float(), wanted))
        return torch.stack(each).mean()

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Walk from noise to latents with ``steps`` Euler steps; see ``Objective.generate``.

        Latents of different shapes fit in no picture: for a list of them, return None.
        """
        latents = batch[LATENTS]
        if not isinstance(latents, Tensor):
            return None
        return sample(
            lambda noisy, timestep: self.predict(model, noisy, timestep, batch),
            latents.shape,
            seed,
            steps,
            latents.device,
            shift=self.sample_shift,
        )


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """One batch on the path from data to noise.

    ``noisy`` and ``target`` have the form of the clean data: stacked, or a list.
    """

    noisy: Tensor | list[Tensor]
    """The model's input, float32."""
    target: Tensor | list[Tensor]
    """The velocity ``noise - x``, float32."""
    sigma: Tensor
    """(B,) float32 in (0, 1): the share of noise."""
    timestep: Tensor
    """(B,) float32 in (0, 1000)."""


def make_flow_batch(
    latents: Tensor | Sequence[Tensor],
    sample_numbers: Sequence[int] | Tensor,
    seed: int,
    draw_sigma: DrawSigma,
) -> FlowBatch:
    """Put each sample at its own random place on the path to noise.

    Args:
        latents: Clean data: (B, ...) of any rank, or a list of B tensors of any shapes.
        sample_numbers: B integers, ``step * global_batch + position``; they alone decide the noise.
        seed: Of the run.
        draw_sigma: Of one sample.

    Returns:
        The batch, float32, on the device of ``latents``.
    """
    numbers = [int(number) for number in sample_numbers]
    assert len(numbers) == len(latents), f"{len(numbers)} sample numbers for {len(latents)} samples"
    noisy, target, sigmas = [], [], []
    for one, number in zip(latents, numbers, strict=True):
        seed_of_one = mix_seed(seed, TRAIN_STREAM, number)
        drawn = _draw(tuple(one.shape), seed_of_one, draw_sigma)
        noise, sigma = (t.to(one.device) for t in drawn)
        clean = one.float()
        noisy.append((1 - sigma) * clean + sigma * noise)
        target.append(noise - clean)
        sigmas.append(sigma)
    sigma = torch.stack(sigmas)
    stacked = isinstance(latents, Tensor)
    return FlowBatch(
        noisy=torch.stack(noisy) if stacked else noisy,
        target=torch.stack(target) if stacked else target,
        sigma=sigma,
        timestep=sigma * TIMESTEPS,
    )


@torch.no_grad()
def sample(
    velocity_fn: Callable[[Tensor, Tensor], Tensor],
    shape: Sequence[int],
    seed: int,
    steps: int,
    device: torch.device | str,
    shift: float = 1.0,
) -> Tensor:
    """Walk from noise to data with ``steps`` Euler steps.

    Args:
        velocity_fn: (noisy (N, ...), timestep (N,)) -> velocity (N, ...).
        shape: (N, ...); sample i starts from noise that depends on (seed, i) alone.
        seed: Of the run.
        steps: Calls of ``velocity_fn``, 1 or more.
        device: Where to compute.
        shift: Above 0; more than 1 spends more of the steps near pure noise.

    Returns:
        (N, ...) float32 on ``device``.

    Raises:
        ConfigError: ``steps`` or ``shift`` is out of range.
    """
    sigmas = euler_sigmas(steps, shift)
    starts = []
    for index in range(shape[0]):
        generator = torch.Generator().manual_seed(mix_seed(seed, SAMPLE_STREAM, index))
        starts.append(torch.randn(tuple(shape[1:]), generator=generator))
    latents = torch.stack(starts).to(device)
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        timestep = torch.full((shape[0],), now * TIMESTEPS, device=device)
        latents = latents + (after - now) * velocity_fn(latents, timestep).float()
    return latents


def euler_sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """Return the ``steps + 1`` noise shares from 1.0 down to 0.0, bent towards noise by ``shift``.

    They are those of diffusers' ``FlowMatchEulerDiscreteScheduler(shift=shift)`` in double
    precision.

    Raises:
        ConfigError: ``steps`` or ``shift`` is out of range.
    """
    if steps < 1:
        raise fields.invalid("samples.steps", steps, "an integer >= 1")
    if not shift > 0:
        raise fields.invalid("samples.shift", shift, "a number > 0")
    return [bend(1 - index / steps, shift) for index in range(steps + 1)]


def _draw(shape: tuple[int, ...], seed: int, draw_sigma: DrawSigma) -> tuple[Tensor, Tensor]:
    """Return standard normal noise of ``shape`` and a sigma, a scalar tensor, on the CPU."""
    # Always the CPU generator: CUDA draws differ between cards and between batch shapes. Sigma is
    # drawn first, so that it does not depend on the shape of the noise.
    generator = torch.Generator().manual_seed(seed)
    sigma = draw_sigma(generator, shape)
    return torch.randn(shape, generator=generator), torch.tensor(sigma)
