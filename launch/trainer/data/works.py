"""What ``cache_latents`` is to encode: which samples, at which size, into which file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dist_layerlr import fields
from dist_layerlr.errors import ModelSourceError
from launch.trainer.cli import blame
from launch.trainer.data.cached import CAPTION, read_header
from launch.trainer.data.clips import Measures, measure
from launch.trainer.data.images import Source
from launch.trainer.data.sizes import Placement, bucket_sizes, nearest, place
from launch.trainer.data.sources import Found
from launch.trainer.families.diffusion import Diffusion

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_IMAGE_PIXELS, _CLIP_PIXELS = 1024 * 1024, 480 * 832
"""What the published models are trained at."""
_CLIP_FRAMES = 81
"""The most that a clip keeps: five seconds of Wan."""
_IMAGE_STEP, _CLIP_STEP = 64, 32
"""Sides of buckets: coarse, so that many samples share one."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be encoded, and how."""

    source: Path
    output: Path
    model: Path
    """Of a whole pipeline."""
    model_type: str
    pixels: int | None
    """Of a bucket's area; None: the family's usual one."""
    step: int | None
    """Of the sides of buckets, in pixels; None: the usual one."""
    size: tuple[int, int] | None
    """Height and width of all samples instead of buckets."""
    frames: int | None
    """The most that a clip keeps; None: the usual number."""
    dtype: str
    device: str
    overwrite: bool
    shard: tuple[int, int]
    """Number of this process and how many there are; each takes every n-th sample."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One sample to encode."""

    sample: Source
    placement: Placement
    frames: int
    fps: float | None
    of_frames: int
    """How many the source has."""
    path: Path
    """Of the output file."""
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What the VAE and the network ask of a size."""

    step: int
    """Sides of buckets are multiples of it."""
    needed: int
    """Those of any size are multiples of it."""
    frames: int | None
    """Frames are a multiple of it, and one; None: images only."""


@dataclass(kw_only=True)
class Report:
    """What became of the samples."""

    found: Found
    """All there are, and those that were skipped."""
    written: int = 0
    """Samples of this run."""
    cut: list[str] = field(default_factory=list)
    """Sources whose captions were longer than a text encoder takes, and which tokenizer cut."""
    shortened: list[str] = field(default_factory=list)
    """Clips that had more frames than were kept."""
    enlarged: list[str] = field(default_factory=list)
    """Sources with fewer pixels than their bucket."""
    uncleaned: list[str] = field(default_factory=list)
    """Packages without which the pipeline leaves captions as they are."""


def grid_of(wish: Wish, family: Diffusion, config: Mapping[str, Any], pipeline: Any) -> Grid:
    """Ask the family for how many pixels and frames one number of the latents stands.

    It answers by the pipeline's own numbers, which come from its VAE.
    """
    one, two = (family.pixel_size(pipeline, torch.empty(1, n, 1, 1)) for n in (1, 2))
    frames = two["num_frames"] - one["num_frames"] if "num_frames" in one else None
    patch = config.get("patch_size", 1)
    side = patch[-1] if isinstance(patch, list) else patch
    needed = one["height"] * math.lcm(family.patch, side)
    step = wish.step or math.lcm(needed, _IMAGE_STEP if frames is None else _CLIP_STEP)
    if step % needed:
        raise fields.invalid("--step", step, f"a multiple of {needed} for this model")
    return Grid(step=step, needed=needed, frames=frames)


def plan(wish: Wish, grid: Grid, report: Report) -> list[Work]:
    """Measure every sample of this process and give it a bucket; skip what has no measures."""
    with blame(f"Invalid --output {str(wish.output)!r}: cannot be made", "choose another folder"):
        wish.output.mkdir(parents=True, exist_ok=True)
    usual = _IMAGE_PIXELS if grid.frames is None else _CLIP_PIXELS
    if wish.size is None:
        sizes = bucket_sizes(wish.pixels or usual, grid.step)
    else:
        sizes = [_fitting(wish.size, grid.needed)]
    works, (mine, processes) = [], wish.shard
    for sample in report.found.samples[mine::processes]:
        try:
            seen = measure(sample)
            frames = _frames(seen, grid, wish.frames)
        except ModelSourceError as error:
            report.found.skip(sample.source, error)
            continue
        placement = place(seen.size, nearest(seen.size, sizes))
        works.append(_work(wish, sample, placement, frames, seen))
    return works


def _fitting(size: tuple[int, int], step: int) -> tuple[int, int]:
    for flag, side in zip(("--height", "--width"), size, strict=True):
        if side % step:
            raise fields.invalid(flag, side, f"a multiple of {step} for this model")
    return size


def _frames(seen: Measures, grid: Grid, most: int | None) -> int:
    """How many frames of a clip are kept: the most that the VAE takes without a rest."""
    if grid.frames is None:
        if seen.frames > 1:
            raise ModelSourceError(
                f"{seen.frames} frames, and this model makes images; give them as images of their"
                " own"
            )
        return 1
    kept = min(seen.frames, most or _CLIP_FRAMES)
    return (kept - 1) // grid.frames * grid.frames + 1


def _work(wish: Wish, sample: Source, placement: Placement, frames: int, seen: Measures) -> Work:
    metadata = {
        CAPTION: sample.caption,
        "source": sample.source,
        **model_metadata(wish),
        "pixels": f"{frames} x {placement.size[0]} x {placement.size[1]}",
        "original": f"{placement.original[0]} x {placement.original[1]}",
        "crop": f"{placement.corner[0]}, {placement.corner[1]}",
    }
    path = wish.output / f"{sample.name}.safetensors"
    return Work(
        sample=sample,
        placement=placement,
        frames=frames,
        fps=seen.fps,
        of_frames=seen.frames,
        path=path,
        metadata=metadata,
    )


def is_missing(work: Work, overwrite: bool) -> bool:
    """Whether a sample is to be encoded; one of other settings is refused.

    From the header alone: a second call over thousands of files takes seconds.
    """
    if overwrite or not work.path.exists():
        return True
    check_metadata(work.path, work.metadata)
    return False


def check_metadata(path: Path, wanted: Mapping[str, str]) -> None:
    """Refuse to keep a file that was written with other settings.

    Raises:
        ModelSourceError: names the setting and both values.
    """
    found = read_header(path).metadata
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ModelSourceError(
                f"{path}: was written with {key} {found.get(key)!r}, this run has {value!r}; add"
                " --overwrite or choose another --output."
            )


def model_metadata(wish: Wish) -> dict[str, str]:
    """What the encoding of a caption depends on."""
    return {
        "model": str(wish.model.resolve()),
        "model_type": wish.model_type,
        "dtype": wish.dtype,
    }
