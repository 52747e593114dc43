"""What the denoisers share that predict noise by ``alphas_cumprod``: SD 1.5, SDXL, PixArt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dist_layerlr.files import read_json
from launch.trainer.data.base import LATENTS
from launch.trainer.families.diffusion import Diffusion
from launch.trainer.families.latents import encode_image
from launch.trainer.objectives import Objective
from launch.trainer.objectives.noise import NoisePrediction

SCHEDULER = "scheduler/scheduler_config.json"
"""Of a pipeline folder."""


class NoiseDenoiser(Diffusion):
    """A denoiser whose noise comes by the betas of the checkpoint's own scheduler."""

    objective_class = NoisePrediction
    betas: ClassVar[Mapping[str, Any]]
    """Of the family's published checkpoints, where no scheduler lies beside the network."""

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make the objective by the scheduler beside the network; see ``Family.objective``."""
        path = model_folder.parent / SCHEDULER
        config: Mapping[str, Any] = self.betas
        note = None
        if path.is_file():
            config = read_json(path)
        else:
            note = (
                f"no {path}: noise by the family's own betas, {config['beta_schedule']}"
                f" {config['beta_start']:g} to {config['beta_end']:g}; the network predicts"
                f" {settings.get('prediction') or 'epsilon'}"
            )
        return self.objective_class(
            predict=self.predict, scheduler=config, note=note, **{**self.defaults, **settings}
        )

    def encode_pixels(self, pipeline: Any, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the normalised mode of the VAE; see ``Diffusion.encode_pixels``."""
        vae = pipeline.vae
        return {LATENTS: _normalised(encode_image(vae, pixels), vae.config)}


def _normalised(raw: Tensor, config: Any) -> Tensor:
    """Scale latents (C, H, W) by what the pipelines undo before they decode."""
    mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is None or std is None:
        return raw * float(config.scaling_factor)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    scaled: Tensor = (raw - mean) * config.scaling_factor / std
    return scaled
