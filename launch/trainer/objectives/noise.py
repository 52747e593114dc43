"""Noise prediction: the noise in a sample, or the velocity v, at whole timesteps of a scheduler.

With ``a`` the scheduler's ``alphas_cumprod`` at timestep t, the network sees
``sqrt(a) * x + sqrt(1 - a) * noise`` and learns the noise, or
``v = sqrt(a) * noise - sqrt(1 - a) * x``. As in flow matching, everything random about a training
sample derives from (seed, sample number).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.fields import setting
from launch.trainer.data.base import LATENTS, Batch
from launch.trainer.objectives.flow import Predict, starting_noise
from launch.trainer.seeds import TRAIN_STREAM, mix_seed

EPSILON, VELOCITY = "epsilon", "v_prediction"
"""Values of ``prediction_type`` in a scheduler's config."""
RESCALE = "rescale_betas_zero_snr"
"""Key of a scheduler's config: its last timestep is pure noise."""
_PURE_NOISE = 1e-6
"""Below this share of signal a timestep is pure noise: Stable Diffusion's betas end at 5e-3, linear
ones at 4e-5, and rescaled ones at 0, or at 2**-24 where a scheduler divides by it."""


@dataclass(frozen=True, kw_only=True)
class NoisePrediction:
    """Predicts the noise of the latents, or v. Satisfies ``Objective``."""

    predict: Predict
    """The family's call; its timestep is (B,) int64."""
    scheduler: Mapping[str, Any]
    """Content of ``scheduler_config.json``."""
    note: str | None = None
    """What a user should know of where the scheduler comes from."""
    level: float | None = None
    """Place of every sample's timestep among those that are trained; None: drawn."""
    prediction: str | None = setting(
        fields.one_of(lambda: (EPSILON, VELOCITY)),
        default=None,
        shown="the checkpoint's",
        doc="What the network returns. To sample elsewhere with another than the checkpoint's, set"
        " `prediction_type` in its scheduler_config.json.",
    )
    min_snr_gamma: float | None = setting(
        fields.number(0.0, open_low=True),
        default=None,
        shown="no weights",
        doc="Weighs each sample by min(snr, gamma) / snr, for v by min(snr, gamma) / (snr + 1);"
        " snr = a / (1 - a).",
    )
    noise_offset: float = setting(
        fields.number(0.0),
        default=0.0,
        doc="Adds this times one normal number per channel to the noise: darker and brighter"
        " pictures.",
    )
    first_timestep: int = setting(
        fields.integer(0), default=0, doc="Smallest timestep that is trained."
    )
    last_timestep: int | None = setting(
        fields.integer(0),
        default=None,
        shown="the scheduler's last",
        doc="Largest timestep that is trained.",
    )
    zero_terminal_snr: bool | None = setting(
        fields.boolean,
        default=None,
        shown="the checkpoint's",
        doc="Rescales the betas so that the last timestep is pure noise. Needs `v_prediction`; to"
        " sample elsewhere, set `rescale_betas_zero_snr` in scheduler_config.json.",
    )

    def __post_init__(self) -> None:
        """Check what settings and scheduler say together.

        Raises:
            ConfigError: a prediction or range that this scheduler cannot have.
            ModelSourceError: a scheduler without betas.
        """
        count = len(self.alphas)
        if self.last_timestep is not None and self.last_timestep >= count:
            raise fields.invalid("objective.last_timestep", self.last_timestep, f"below {count}")
        if self.first_timestep > self._last:
            allowed = f"at most the last timestep {self._last}"
            raise fields.invalid("objective.first_timestep", self.first_timestep, allowed)
        if self._predicts not in (EPSILON, VELOCITY):
            raise ModelSourceError(
                f"scheduler_config.json has prediction_type={self._predicts!r}: must be {EPSILON}"
                f" or {VELOCITY}. Take the scheduler of the model's own pipeline."
            )
        if self._predicts == EPSILON and self.alphas[-1] < _PURE_NOISE:
            raise ConfigError(
                f"Invalid objective.prediction={EPSILON!r} with betas of zero terminal SNR: at the"
                " last timestep the input is the noise, and the picture cannot be computed from"
                f" it. Set prediction={VELOCITY!r}, or zero_terminal_snr=false."
            )

    @cached_property
    def alphas(self) -> Tensor:
        """The scheduler's ``alphas_cumprod``, float32, one for each timestep.

        Raises:
            ConfigError: ``zero_terminal_snr`` for a scheduler without it.
            ModelSourceError: a scheduler without betas, or none of diffusers.
        """
        import diffusers

        name = self.scheduler.get("_class_name", "DDPMScheduler")
        made = getattr(diffusers, name, None)
        config = dict(self.scheduler)
        if made is not None and self.zero_terminal_snr is not None:
            if self.zero_terminal_snr and RESCALE not in inspect.signature(made).parameters:
                raise ConfigError(
                    f"Invalid objective.zero_terminal_snr=true: {name} of scheduler_config.json"
                    " has no such betas. Write a DDIMScheduler into it, which samples with them."
                )
            config[RESCALE] = self.zero_terminal_snr
        alphas = None if made is None else getattr(made.from_config(config), "alphas_cumprod", None)
        if alphas is None:
            raise ModelSourceError(
                f"scheduler_config.json names {name}, which has no alphas_cumprod. This family"
                " predicts noise: take the scheduler of the model's own pipeline."
            )
        return torch.as_tensor(alphas, dtype=torch.float32)

    def at_level(self, level: float) -> NoisePrediction:
        """Return the same objective with every sample at one level; see ``HasLevels``."""
        return replace(self, level=level)

    @property
    def _predicts(self) -> str:
        return self.prediction or self.scheduler.get("prediction_type", EPSILON)

    @property
    def _last(self) -> int:
        return len(self.alphas) - 1 if self.last_timestep is None else self.last_timestep

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the weighted mean squared error, in float32; see ``Objective.loss``."""
        given = self.make_batch(batch[LATENTS], numbers, seed)
        found = self.predict(model, given.noisy, given.timestep, batch)
        each = mse_loss(found.float(), given.target, reduction="none").flatten(1).mean(1)
        mean: Tensor = (each * given.weight).mean()
        return mean

    def make_batch(self, latents: Tensor, numbers: Sequence[int], seed: int) -> NoisyBatch:
        """Add to each sample its own noise, at its own timestep.

        Args:
            latents: Clean data (B, C, ...).
            numbers: B integers, ``step * global_batch + position``; they alone decide the noise.
            seed: Of the run.

        Returns:
            The batch, float32, on the device of ``latents``.
        """
        assert len(numbers) == len(latents), f"{len(numbers)} numbers for {len(latents)} samples"
        drawn = [self._draw(tuple(latents.shape[1:]), seed, number) for number in numbers]
        timestep = torch.stack([step for step, _ in drawn])
        alphas = self.alphas[timestep]
        weight = self._weight(alphas).to(latents.device)
        kept = alphas.to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        clean = latents.float()
        noise = torch.stack([one for _, one in drawn]).to(latents.device)
        target = noise
        if self._predicts == VELOCITY:
            target = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        return NoisyBatch(
            noisy=kept.sqrt() * clean + (1 - kept).sqrt() * noise,
            target=target,
            timestep=timestep.to(latents.device),
            weight=weight,
        )

    def _draw(self, shape: tuple[int, ...], seed: int, number: int) -> tuple[Tensor, Tensor]:
        """Return the timestep and the noise of one sample, on the CPU."""
        # The CPU generator, as in flow matching. The offset comes last, so that the noise below it
        # is the same with and without one.
        generator = torch.Generator().manual_seed(mix_seed(seed, TRAIN_STREAM, number))
        timestep = torch.randint(self.first_timestep, self._last + 1, (), generator=generator)
        if self.level is not None:
            span = self._last - self.first_timestep
            timestep.fill_(self.first_timestep + round(self.level * span))
        noise = torch.randn(shape, generator=generator)
        each = torch.randn((shape[0], *[1] * (len(shape) - 1)), generator=generator)
        return timestep, noise + self.noise_offset * each

    def _weight(self, alphas: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(alphas)
        snr = alphas / (1 - alphas)
        kept = snr.clamp(max=self.min_snr_gamma)
        return kept / (snr + 1 if self._predicts == VELOCITY else snr)

    def fit_pipeline(self, pipeline: Any) -> None:
        """Give the pipeline's scheduler this prediction and these betas."""
        own = pipeline.scheduler
        changed: dict[str, Any] = {"prediction_type": self._predicts}
        if self.zero_terminal_snr is not None:
            changed[RESCALE] = self.zero_terminal_snr
            if self.zero_terminal_snr:
                # Other spacings leave the last timestep out, which is the one that changed.
                changed["timestep_spacing"] = "trailing"
        pipeline.scheduler = type(own).from_config(own.config, **changed)

    @torch.no_grad()
    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Walk from noise to latents by DDIM without new noise; see ``Objective.generate``."""
        latents = batch[LATENTS]
        count = len(self.alphas)
        if not 1 <= steps <= count:
            raise fields.invalid("samples.steps", steps, f"an integer in [1, {count}]")
        # Not diffusers' DDIMScheduler: it steps by whole fractions of the timesteps, and with 7
        # steps of 1000 stops before the end. The last step here leads to the clean picture, where
        # Stable Diffusion's own scheduler keeps the noise of timestep 0.
        timesteps = [round(count - count * index / steps) - 1 for index in range(steps)]
        shares = [*self.alphas[timesteps].tolist(), 1.0]
        noisy = starting_noise(latents.shape, seed).to(latents.device)
        for index, step in enumerate(timesteps):
            now, after = shares[index], shares[index + 1]
            timestep = torch.full((len(noisy),), step, device=latents.device)
            found = self.predict(model, noisy, timestep, batch).float()
            signal, noise = now**0.5, (1 - now) ** 0.5
            if self._predicts == VELOCITY:
                clean = signal * noisy - noise * found
                found = signal * found + noise * noisy
            else:
                clean = (noisy - noise * found) / signal
            noisy = after**0.5 * clean + (1 - after) ** 0.5 * found
        return noisy


@dataclass(frozen=True, kw_only=True)
class NoisyBatch:
    """One batch, each sample at its own timestep."""

    noisy: Tensor
    """The model's input (B, C, ...), float32."""
    target: Tensor
    """What it is to return, float32."""
    timestep: Tensor
    """(B,) int64."""
    weight: Tensor
    """(B,) float32: what each sample counts."""
