"""Encodes a folder with a pipeline's own VAE and text encoders, one after the other.

Text encoders come first and are gone before the VAE runs, since both may not fit on one device.
What they made waits in a hidden folder beside the samples, so that a run that was cut off goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dist_layerlr import fields
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.files import whole_file
from launch.trainer.cli import blame
from launch.trainer.data.cached import CAPTION, EMPTY_PROMPT, read_header
from launch.trainer.data.clips import Measures, load_placed, load_sound, measure
from launch.trainer.data.images import Source
from launch.trainer.data.pipelines import (
    PIXEL_PARTS,
    TEXT_PARTS,
    Cuts,
    free_memory,
    load_parts,
    read_index,
)
from launch.trainer.data.sizes import Placement, bucket_sizes, nearest, place
from launch.trainer.data.sources import Found, gather
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import Diffusion, Origin

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = ".prompts"
"""Hidden sub-folder of prompts whose picture is not encoded yet."""
_IMAGE_PIXELS, _CLIP_PIXELS = 1024 * 1024, 480 * 832
"""What the published models are trained at."""
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
    """The most that a clip keeps; None: all that the VAE takes."""
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
    enlarged: list[str] = field(default_factory=list)
    """Sources with fewer pixels than their bucket."""


def cache(wish: Wish) -> Report:
    """Encode what is not encoded yet.

    Raises:
        LayerLRError: the model, the output or the whole input cannot be used.
    """
    family, config = _family(wish)
    report = Report(found=gather(wish.source))
    if wish.shard[0] > 0:
        # The first process lists what none of them can use.
        report.found.skipped.clear()
    pixels = load_parts(wish.model, PIXEL_PARTS, DTYPES[wish.dtype], wish.model_type)
    grid = _grid(wish, family, config, pixels)
    works = _plan(wish, grid, report)
    missing = [work for work in works if _is_missing(work, wish.overwrite)]
    report.enlarged = [work.sample.source for work in missing if work.placement.enlarged]
    _encode_prompts(wish, family, missing, report)
    _encode_pixels(wish, family, config, pixels, missing, report)
    remove_empty(wish.output / PROMPTS)
    return report


# The model


def _family(wish: Wish) -> tuple[Diffusion, Mapping[str, Any]]:
    """Return the family and the network's config, read without its weights.

    Raises:
        LayerLRError: a family without latents, or a pipeline of another one.
    """
    family = get_family(wish.model_type)
    if not isinstance(family, Diffusion):
        raise fields.invalid("--model-type", wish.model_type, "a family that trains on latents")
    found, config = read_index(wish.model, family.subfolder)
    family.check_config(config)
    wanted = family.pipeline_name(config)
    if found != wanted:
        raise ModelSourceError(
            f"Invalid --model {str(wish.model)!r}: it holds a {found}, but"
            f" --model-type={wish.model_type!r} needs a {wanted}."
        )
    return family, config


def _grid(wish: Wish, family: Diffusion, config: Mapping[str, Any], pipeline: Any) -> Grid:
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


# The samples


def _plan(wish: Wish, grid: Grid, report: Report) -> list[Work]:
    """Measure every sample and give it a bucket. What cannot be measured is skipped."""
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
        works.append(_work(wish, sample, placement, frames, seen.fps))
    return works


def _fitting(size: tuple[int, int], step: int) -> tuple[int, int]:
    for flag, side in zip(("--height", "--width"), size, strict=True):
        if side % step:
            raise fields.invalid(flag, side, f"a multiple of {step} for this model")
    return size


def _frames(seen: Measures, grid: Grid, most: int | None) -> int:
    """How many frames of a clip are kept: the most that the VAE takes without a rest."""
    if grid.frames is None:
        with blame("a model of images takes no clips", "give the frames as images of their own"):
            assert seen.frames == 1, f"{seen.frames} frames"
        return 1
    kept = min(seen.frames, most or seen.frames)
    return (kept - 1) // grid.frames * grid.frames + 1


def _work(wish: Wish, sample: Source, placement: Placement, frames: int, fps: float | None) -> Work:
    metadata = {
        CAPTION: sample.caption,
        "source": sample.source,
        **_model_metadata(wish),
        "pixels": f"{frames} x {placement.size[0]} x {placement.size[1]}",
        "original": f"{placement.original[0]} x {placement.original[1]}",
        "crop": f"{placement.corner[0]}, {placement.corner[1]}",
    }
    path = wish.output / f"{sample.name}.safetensors"
    return Work(
        sample=sample,
        placement=placement,
        frames=frames,
        fps=fps,
        path=path,
        metadata=metadata,
    )


def _is_missing(work: Work, overwrite: bool) -> bool:
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


# Encoding


def _encode_prompts(wish: Wish, family: Diffusion, works: Sequence[Work], report: Report) -> None:
    """Encode the captions that are not encoded yet, and the empty one."""
    told = _model_metadata(wish)
    waiting = {}
    for work in works:
        path, wanted = _prompt_file(wish, work), {**told, CAPTION: work.sample.caption}
        if not path.exists() or read_header(path).metadata != wanted:
            waiting[path] = work.sample
    # No sample has this path.
    empty = wish.output / EMPTY_PROMPT
    if wish.shard[0] == 0:
        if empty.exists() and not wish.overwrite:
            check_metadata(empty, told)
        else:
            waiting[empty] = Source(name="", frames=(), caption="", source="the empty prompt")
    if not waiting:
        return
    pipeline = load_parts(wish.model, TEXT_PARTS, DTYPES[wish.dtype], wish.model_type)
    pipeline.to(wish.device)
    cuts = Cuts(pipeline)
    for path, sample in tqdm(waiting.items(), unit="caption", disable=None):
        with torch.inference_mode():
            prompt = family.encode_prompt(pipeline, sample.caption)
        stored = _stored(prompt, DTYPES[wish.dtype], sample.source, prompt)
        write_sample(path, stored, {**told, CAPTION: sample.caption})
        report.cut += [f"{sample.source} by {name}" for name in sorted(cuts.names)]
        cuts.names.clear()
    del pipeline, cuts
    free_memory()


def _encode_pixels(
    wish: Wish,
    family: Diffusion,
    config: Mapping[str, Any],
    pipeline: Any,
    works: Sequence[Work],
    report: Report,
) -> None:
    """Encode pictures, each with its prompt into its own file."""
    if wish.dtype == "fp16" and getattr(pipeline.vae.config, "force_upcast", False):
        # Its activations overflow in half precision.
        pipeline.vae.to(torch.float32)
    pipeline.to(wish.device)
    for work in tqdm(works, unit="sample", disable=None):
        try:
            pixels = load_placed(work.sample, work.placement, work.frames)
            origin = _origin(work)
        except ModelSourceError as error:
            report.found.skip(work.sample.source, error)
            continue
        with torch.inference_mode():
            encoded = family.encode_source(pipeline, pixels, origin)
        waiting = _prompt_file(wish, work)
        stored = _stored(encoded, DTYPES[wish.dtype], work.sample.source)
        tensors = {**stored, **load_file(waiting)}
        if report.written == 0:
            family.check_sample(config, tensors, work.sample.source)
        write_sample(work.path, tensors, work.metadata)
        waiting.unlink()
        report.written += 1


def _origin(work: Work) -> Origin:
    sound = rate = None
    if work.sample.audio is not None:
        sound, rate = load_sound(work.sample.audio)
    return Origin(
        size=work.placement.original,
        corner=work.placement.corner,
        fps=work.fps,
        sound=sound,
        rate=rate,
    )


def _stored(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, source: str, prompts: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Bring tensors to the CPU, large ones in the stored type; 8 bits would round a size.

    Raises:
        ModelSourceError: a tensor holds NaN or infinity.
    """
    found, kept = {}, set(prompts)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelSourceError(
                f"{source}: {name} came out as NaN or infinity; run again with --dtype bf16 or"
                " fp32."
            )
        large = tensor.is_floating_point() and (tensor.ndim > 1 or name in kept)
        found[name] = tensor.to("cpu", dtype if large else tensor.dtype).contiguous()
    return found


def write_sample(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file: whole under its final name, or not at all.

    Raises:
        ModelSourceError: the folder cannot be written to.
    """
    with blame(f"{path}: cannot be written", "free space or choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several of these programs may fill one folder.
        with whole_file(path, shared=True) as partial:
            save_file(tensors, partial, metadata=dict(metadata))


def remove_empty(folder: Path) -> None:
    """Remove a folder of folders without files; one with files stays, for the next run."""
    inner = sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in [*inner, folder]:
        # Another process may be about to write into it.
        with suppress(OSError):
            path.rmdir()


def _model_metadata(wish: Wish) -> dict[str, str]:
    """What the encoding of a caption depends on."""
    return {
        "model": str(wish.model.resolve()),
        "model_type": wish.model_type,
        "dtype": wish.dtype,
    }


def _prompt_file(wish: Wish, work: Work) -> Path:
    # Not called .safetensors: the data set would take it for a sample.
    return wish.output / PROMPTS / f"{work.sample.name}.prompt"
