"""Flow matching for any model family: noise, timesteps and targets, and a plain Euler sampler.

The path is the straight line ``x_sigma = (1 - sigma) * x + sigma * noise`` and the model learns its
velocity ``noise - x``. Everything random about a training sample derives from (seed, sample number)
and nothing else, where the sample number is ``step * global_batch + position``: the same run on 1
or N ranks sees the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_layerlr import fields

TIMESTEPS = 1000.0
"""The timestep of pure noise: ``timestep = sigma * TIMESTEPS``, as Wan and most flow models
count."""

_TRAIN_SHIFT = 1.5
"""Bends the training sigmas a little towards noise, where a clip's layout is decided."""
_TRAIN_STREAM, _SAMPLE_STREAM = 1, 2
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """One batch on the path from data to noise."""

    noisy: Tensor
    """(B, C, F, H, W) float32, the model's input."""
    target: Tensor
    """(B, C, F, H, W) float32, the velocity ``noise - x``."""
    sigma: Tensor
    """(B,) float32 in (0, 1): the share of noise."""
    timestep: Tensor
    """(B,) float32 in (0, 1000)."""


def mix_seed(*numbers: int) -> int:
    """Mix integers into one seed in [0, 2**63), the same on every machine, rank and Python
    version.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        # The finaliser of splitmix64: neighbouring numbers give unrelated seeds.
        state = ((state ^ (number & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def make_flow_batch(
    latents: Tensor, sample_numbers: Sequence[int] | Tensor, seed: int
) -> FlowBatch:
    """Put each sample at its own random place on the path to noise.

    Args:
        latents: (B, C, F, H, W) clean data.
        sample_numbers: B integers, ``step * global_batch + position``; they alone decide the noise.
        seed: of the run.

    Returns:
        The batch, float32, on the device of ``latents``.
    """
    numbers = [int(number) for number in sample_numbers]
    assert len(numbers) == len(latents), f"{len(numbers)} sample numbers for {len(latents)} samples"
    draws = [
        _draw(tuple(latents.shape[1:]), mix_seed(seed, _TRAIN_STREAM, number)) for number in numbers
    ]
    noise = torch.stack([noise for noise, _ in draws]).to(latents.device)  # (B, C, F, H, W)
    sigma = torch.stack([sigma for _, sigma in draws]).to(latents.device)  # (B,)
    clean, share = latents.float(), sigma.view(-1, *[1] * (latents.ndim - 1))
    return FlowBatch(
        noisy=(1 - share) * clean + share * noise,
        target=noise - clean,
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
    shift: float = 2.0,
) -> Tensor:
    """Walk from noise to data with ``steps`` Euler steps.

    Args:
        velocity_fn: (noisy (N, C, F, H, W), timestep (N,)) -> velocity (N, C, F, H, W).
        shape: (N, C, F, H, W); sample i starts from noise that depends on (seed, i) alone.
        seed: of the run.
        steps: calls of ``velocity_fn``, 1 or more.
        device: where to compute.
        shift: above 0; more than 1 spends more of the steps near pure noise.

    Returns:
        (N, C, F, H, W) float32 on ``device``.

    Raises:
        ConfigError: ``steps`` or ``shift`` is out of range.
    """
    sigmas = euler_sigmas(steps, shift)
    seeds = [mix_seed(seed, _SAMPLE_STREAM, index) for index in range(shape[0])]
    latents = torch.stack([_draw(tuple(shape[1:]), one)[0] for one in seeds]).to(device)
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        timestep = torch.full((shape[0],), now * TIMESTEPS, device=device)
        latents = latents + (after - now) * velocity_fn(latents, timestep).float()
    return latents


def euler_sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """Return the ``steps + 1`` noise shares from 1.0 down to 0.0, bent towards noise by ``shift``.

    Raises:
        ConfigError: ``steps`` or ``shift`` is out of range.
    """
    if steps < 1:
        raise fields.invalid("samples.steps", steps, "an integer >= 1")
    if not shift > 0:
        raise fields.invalid("samples.shift", shift, "a number > 0")
    return [_bend(1 - index / steps, shift) for index in range(steps + 1)]


def _bend(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _draw(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Return standard normal noise of ``shape`` and a bent logit-normal sigma (a scalar tensor),
    both on the CPU.
    """
    # Always the CPU generator: CUDA draws differ between cards and between batch shapes.
    generator = torch.Generator().manual_seed(seed)
    sigma = _bend(torch.randn((), generator=generator).sigmoid().item(), _TRAIN_SHIFT)
    return torch.randn(shape, generator=generator), torch.tensor(sigma)
