"""The share of noise of each training sample, sigma: distributions on (0, 1).

Flow matching's path is ``x_sigma = (1 - sigma) * x + sigma * noise``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch

from dist_layerlr import fields
from dist_layerlr.fields import setting

TIMESTEPS = 1000.0
"""The timestep of pure noise: ``timestep = sigma * TIMESTEPS``, as most flow models count."""
LOGIT_NORMAL, UNIFORM = "logit_normal", "uniform"
_TINY = 1e-12
BY_RESOLUTION = "resolution"
"""The value of ``shift`` that grows with the number of tokens."""
DrawSigma = Callable[[torch.Generator, tuple[int, ...]], float]
"""(generator, shape of one sample's latents) -> its share of noise, in (0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A shift that grows with the number of tokens, as the models' own schedulers compute it.

    ``shift = exp(mu)``, and mu is the line through two points, continued beyond them.
    """

    tokens_of: Callable[[tuple[int, ...]], int]
    """Shape of one sample's latents -> its tokens."""
    tokens: tuple[int, int]
    mu: tuple[float, float]

    def shift(self, shape: tuple[int, ...]) -> float:
        """Return the shift for latents of this shape."""
        (few, many), (low, high) = self.tokens, self.mu
        return math.exp(low + (high - low) * (self.tokens_of(shape) - few) / (many - few))


@dataclass(frozen=True, kw_only=True)
class SigmaDistribution:
    """Draws the share of noise of a sample.

    Sigma is drawn from a distribution on (0, 1), bent by ``shift``, and kept to [low, high]: the
    part of the bent distribution outside is left out.
    """

    resolution: Resolution | None = None
    """What ``shift="resolution"`` means for this family; None: it has no such shift."""
    level: float | None = None
    """Place in [low, high] of every sample; None: drawn."""
    timesteps: str = setting(
        fields.one_of(lambda: (LOGIT_NORMAL, UNIFORM)),
        default=LOGIT_NORMAL,
        doc="Distribution of the noise shares before the shift.",
    )
    mean: float = setting(
        fields.number(-10.0, 10.0), default=0.0, doc="Of the logit; logit_normal only."
    )
    std: float = setting(
        fields.number(0.0, open_low=True), default=1.0, doc="Of the logit; logit_normal only."
    )
    shift: float | str = setting(
        fields.either(BY_RESOLUTION, fields.number(0.0, open_low=True)),
        default=1.0,
        shown="the family's own",
        doc="Bends noise shares in training: s -> shift s / (1 + (shift - 1) s). More than 1 trains"
        " more near pure noise.",
    )
    low: float = setting(
        fields.number(0.0, 1.0), default=0.0, doc="Smallest noise share that is trained."
    )
    high: float = setting(
        fields.number(0.0, 1.0), default=1.0, doc="Largest noise share that is trained."
    )

    def __post_init__(self) -> None:
        """Check what the settings say together.

        Raises:
            ConfigError: an empty range, or a shift that the family does not have.
        """
        if self.low >= self.high:
            raise fields.invalid("objective.low", self.low, f"below objective.high={self.high}")
        if self.shift == BY_RESOLUTION and self.resolution is None:
            raise fields.invalid("objective.shift", self.shift, "a number > 0 for this family")

    def draw_sigma(self, generator: torch.Generator, shape: tuple[int, ...]) -> float:
        """Draw the share of noise of one sample whose latents have this shape."""
        if self.level is not None:
            return self.low + (self.high - self.low) * self.level
        shift = self.shift
        if isinstance(shift, str):
            assert self.resolution is not None, "checked when it was made"
            shift = self.resolution.shift(shape)
        if self.timesteps == UNIFORM:
            return bend(self._kept(torch.rand((), generator=generator).item(), shift), shift)
        normal = torch.randn((), generator=generator)
        if (self.low, self.high) == (0.0, 1.0):
            return bend((normal * self.std + self.mean).sigmoid().item(), shift)
        share = self._kept(NormalDist().cdf(normal.item()), shift)
        return bend(_sigmoid(self._logit_at(share)), shift)

    def at_level(self, level: float) -> Any:
        """Return the same objective with every sample at one level; see ``HasLevels``."""
        return replace(self, level=level)

    def share(self) -> float:
        """Return how much of the whole distribution lies in [low, high].

        It must not depend on the size of a sample: ``shift`` is a number.
        """
        assert not isinstance(self.shift, str), "a shift by resolution has no share of its own"
        below, above = (self._share_below(_unbend(s, self.shift)) for s in (self.low, self.high))
        return above - below

    def _kept(self, share: float, shift: float) -> float:
        """Move a share of the whole distribution into the part whose sigmas are trained."""
        below, above = (self._share_below(_unbend(s, shift)) for s in (self.low, self.high))
        return below + (above - below) * share

    def _share_below(self, sigma: float) -> float:
        """The share of the distribution before the shift that lies below ``sigma``."""
        if self.timesteps == UNIFORM or sigma in (0.0, 1.0):
            return sigma
        logit = math.log(sigma / (1 - sigma))
        return NormalDist(self.mean, self.std).cdf(logit)

    def _logit_at(self, share: float) -> float:
        # The inverse has no value at 0 and 1, which rounding can reach.
        inside = min(max(share, _TINY), 1 - _TINY)
        return NormalDist(self.mean, self.std).inv_cdf(inside)


def bend(sigma: float, shift: float) -> float:
    """Move a share of noise towards pure noise where ``shift`` is above 1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _unbend(sigma: float, shift: float) -> float:
    return sigma / (shift - (shift - 1) * sigma)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
