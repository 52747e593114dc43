"""Samples by the model's own pipeline, from cached prompts: no text encoder is loaded.

The network is the live one, under whatever sharder it trains. All ranks call the pipeline alike,
because the network's forward pass may be collective.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_layerlr.sharders import unwrap
from launch.trainer.cli import blame
from launch.trainer.data.base import LATENTS, Batch
from launch.trainer.families.diffusion import Diffusion, from_diffusers
from launch.trainer.seeds import SAMPLE_STREAM, mix_seed

INDEX = "model_index.json"
_NOT_NEEDED = ("text_encoder", "tokenizer", "image_encoder", "image_processor", "safety_checker")
"""How the names of those components begin whose work is in the cache, or not wanted."""


def pipeline_of(model_folder: str | Path) -> Path | None:
    """Return the pipeline folder that a network's folder lies in; None where it lies alone."""
    parent = Path(model_folder).resolve().parent
    complete = (parent / INDEX).is_file() and (parent / "vae").is_dir()
    return parent if complete else None


def load_pipeline(
    family: Diffusion,
    model_folder: str | Path,
    models: Mapping[str, nn.Module],
    device: torch.device,
) -> Any:
    """Load the pipeline that live networks belong to, around them.

    Wan 2.2's other expert is loaded too where it does not train: a clip needs both.

    Args:
        family: Names the pipeline's class.
        model_folder: Of a network, in its pipeline's folder.
        models: The networks, or their wrappers: one of any name, or each by its component.
        device: Where they run; the VAE goes there too.

    Raises:
        ModelSourceError: a component is missing or damaged.
    """
    import diffusers

    own = Path(model_folder).resolve()
    folder, component = own.parent, own.name
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    live = dict(models) if len(models) > 1 else {component: next(iter(models.values()))}
    unneeded = [name for name in index if name.startswith(_NOT_NEEDED) or name in live]
    absent: dict[str, None] = dict.fromkeys(unneeded)
    # Its warnings are for callers who forget what a cached prompt lacks on purpose.
    diffusers.utils.logging.set_verbosity_error()
    # A variant may have a pipeline of its own: text-to-video and image-to-video.
    first = next(iter(models.values()))
    name = family.pipeline_name(_config(first))
    pipeline_class = from_diffusers(name, family.model_type)
    diffusers.utils.logging.disable_progress_bar()
    with blame(f"{folder}: {name} cannot be loaded", "download it again"):
        pipeline = pipeline_class.from_pretrained(str(folder), local_files_only=True, **absent)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(device).requires_grad_(False)
    # After loading: from_pretrained refuses wrappers, which are of other classes.
    pipeline.register_modules(**{name: _callable(model) for name, model in live.items()})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _callable(model: nn.Module) -> Any:
    """Return what a pipeline can call and ask for its config and dtype.

    FSDP's wrappers pass attributes on; those of DDP and DeepSpeed do not, and their forward passes
    need nothing that the module's own lacks.
    """
    own: Any = model
    engine = hasattr(model, "zero_optimization")
    return own.module if engine or isinstance(model, DistributedDataParallel) else model


def _config(model: nn.Module) -> Any:
    network: Any = unwrap(model)
    return network.config


@torch.no_grad()
def sample_by_pipeline(
    family: Diffusion, pipeline: Any, batch: Batch, seed: int, steps: int, guidance: float
) -> Tensor:
    """Generate one image or clip for each prompt of a batch. Collective.

    Args:
        family: How its pipeline takes cached prompts.
        pipeline: What ``load_pipeline`` returned.
        batch: What the family's ``collate`` returned, on the device.
        seed: Of the run; sample i starts from noise that depends on (seed, i) alone.
        steps: Denoising steps.
        guidance: 1: without a negative prompt.

    Returns:
        (B, 3, H, W) or (B, 3, F, H, W) in [-1, 1].
    """
    # A family of several streams holds them by name; the size of all follows from the first.
    latents = batch[LATENTS]
    first = next(iter(latents.values())) if isinstance(latents, Mapping) else latents
    starts = []
    for index in range(len(first)):
        starts.append(torch.Generator().manual_seed(mix_seed(seed, SAMPLE_STREAM, index)))
    options = {
        **family.pipeline_inputs(batch, guidance),
        **family.pixel_size(pipeline, first[0]),
        "num_inference_steps": steps,
        "generator": starts,
        "output_type": "pt",
    }
    with family.pipeline_with(pipeline, batch):
        made = pipeline(**options)
    # Pipelines of clips return frames before channels.
    shown = made.frames.transpose(1, 2) if hasattr(made, "frames") else made.images
    return torch.as_tensor(shown).float() * 2 - 1
