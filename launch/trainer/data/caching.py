"""Encodes a folder with a pipeline's own VAE and text encoders, one after the other.

Text encoders come first and are gone before the VAE runs, since both may not fit on one device.
What they made waits in a hidden folder beside the samples, so that a run that was cut off goes on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.files import read_json, whole_file
from launch.trainer.cli import blame
from launch.trainer.data.cached import CAPTION, EMPTY_PROMPT, read_header
from launch.trainer.data.clips import Measures, load_placed, measure
from launch.trainer.data.images import Source
from launch.trainer.data.sizes import Placement, bucket_sizes, nearest, place
from launch.trainer.data.sources import Found, gather
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import Diffusion, from_diffusers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = ".prompts"
"""Hidden sub-folder of prompts whose picture is not encoded yet."""
_INDEX = "model_index.json"
_TEXT = ("text_encoder", "tokenizer", "connectors")
"""Beginnings of the components that ``Diffusion.encode_prompt`` may need."""
_PIXELS = ("vae", "audio_vae", "image_encoder", "image_processor", "feature_extractor")
"""Those that ``Diffusion.encode_pixels`` may need."""
_IMAGE_PIXELS, _CLIP_PIXELS = 1024 * 1024, 480 * 832
"""What the published models are trained at."""


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
    path: Path
    """Of the output file."""
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What the VAE and the network ask of a size."""

    step: int
    """Height and width are multiples of it."""
    frames: int | None
    """Frames are a multiple of it, and one; None: images only."""


def cache(wish: Wish) -> tuple[int, Found]:
    """Encode what is not encoded yet.

    Returns:
        The number of samples written, and everything that was found, skipped files with why.

    Raises:
        LayerLRError: the model, the output or the whole input cannot be used.
    """
    family = _family(wish)
    config = _network_config(wish, family)
    found = gather(wish.source)
    pixels = load_parts(wish, _PIXELS)
    grid = _grid(family, pixels)
    works = _plan(wish, family, grid, found)
    missing = [work for work in works if _is_missing(work, wish.overwrite)]
    _encode_prompts(wish, family, missing)
    written = _encode_pixels(wish, family, config, pixels, missing, found)
    return written, found


# The model


def _family(wish: Wish) -> Diffusion:
    family = get_family(wish.model_type)
    if not isinstance(family, Diffusion):
        raise ConfigError(
            f"Invalid --model-type={wish.model_type!r}: it is not trained on latents and needs no"
            " cache."
        )
    return family


def _network_config(wish: Wish, family: Diffusion) -> Mapping[str, Any]:
    """Read the network's config, without its weights; refuse another family's pipeline."""
    index, path = wish.model / _INDEX, wish.model / family.subfolder / "config.json"
    for needed in (index, path):
        if not needed.is_file():
            raise ModelSourceError(
                f"Invalid --model {str(wish.model)!r}: no {needed.relative_to(wish.model)} there;"
                " give the folder of a whole pipeline."
            )
    config = read_json(path)
    family.check_config(config)
    return config


def load_parts(wish: Wish, kept: Sequence[str]) -> Any:
    """Load a pipeline with some of its components, on the CPU; the others are None.

    Raises:
        ModelSourceError: a component is missing or damaged.
    """
    index = read_json(wish.model / _INDEX)
    names = [name for name, entry in index.items() if isinstance(entry, list)]
    absent = {name: None for name in names if not name.startswith(tuple(kept))}
    # Standard error is for our own progress bar.
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    cls = from_diffusers(str(index["_class_name"]), wish.model_type)
    where = f"Invalid --model {str(wish.model)!r}: {cls.__name__} cannot be loaded"
    with blame(where, "download the folder again"):
        options = {"torch_dtype": DTYPES[wish.dtype], "local_files_only": True}
        pipeline = cls.from_pretrained(wish.model, **options, **absent)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return pipeline


def _grid(family: Diffusion, pipeline: Any) -> Grid:
    """Ask the family how many pixels a latent pixel, and how many frames a latent frame, stands for.

    By the pipeline's own numbers, which come from its VAE.
    """
    one, two = (family.pixel_size(pipeline, torch.empty(1, n, 1, 1)) for n in (1, 2))
    frames = two["num_frames"] - one["num_frames"] if "num_frames" in one else None
    return Grid(step=one["height"] * family.side_multiple, frames=frames)


# The samples


def _plan(wish: Wish, family: Diffusion, grid: Grid, found: Found) -> list[Work]:
    """Measure every sample and give it a bucket. What cannot be measured is skipped."""
    with blame(f"Invalid --output {str(wish.output)!r}: cannot be made", "choose another folder"):
        wish.output.mkdir(parents=True, exist_ok=True)
    usual = _IMAGE_PIXELS if grid.frames is None else _CLIP_PIXELS
    if wish.size is None:
        sizes = bucket_sizes(wish.pixels or usual, grid.step)
    else:
        sizes = [_fitting(wish.size, grid.step)]
    works, (mine, processes) = [], wish.shard
    for sample in found.samples[mine::processes]:
        try:
            seen = measure(sample)
            frames = _frames(seen, grid, wish.frames)
        except ModelSourceError as error:
            found.skip(sample.source, error)
            continue
        placement = place(seen.size, nearest(seen.size, sizes))
        works.append(_work(wish, sample, placement, frames))
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


def _work(wish: Wish, sample: Source, placement: Placement, frames: int) -> Work:
    metadata = {
        CAPTION: sample.caption,
        "source": sample.source,
        "model": str(wish.model.resolve()),
        "model_type": wish.model_type,
        "pixels": f"{frames} x {placement.size[0]} x {placement.size[1]}",
        "original": f"{placement.original[0]} x {placement.original[1]}",
        "crop": f"{placement.corner[0]}, {placement.corner[1]}",
        "dtype": wish.dtype,
    }
    path = wish.output / f"{sample.name}.safetensors"
    return Work(
        sample=sample, placement=placement, frames=frames, path=path, metadata=metadata
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


def _encode_prompts(wish: Wish, family: Diffusion, works: Sequence[Work]) -> None:
    """Encode the captions that are not encoded yet, and the empty one."""
    todo = {_prompt_file(wish, work): work.sample.caption for work in works}
    told = {key: value for key, value in _work_model(wish).items()}
    waiting: dict[Path, str] = {}
    for path, caption in todo.items():
        fresh = path.exists() and read_header(path).metadata == {**told, CAPTION: caption}
        if not fresh:
            waiting[path] = caption
    empty = wish.output / EMPTY_PROMPT
    if wish.shard[0] == 0:
        if empty.exists() and not wish.overwrite:
            check_metadata(empty, told)
        else:
            waiting[empty] = ""
    if not waiting:
        return
    pipeline = load_parts(wish, _TEXT)
    _to_device(pipeline, wish.device)
    for path, caption in tqdm(waiting.items(), unit="caption", disable=None):
        with torch.inference_mode():
            prompt = family.encode_prompt(pipeline, caption)
        write_tensors(path, _stored(prompt, wish, prompt), {**told, CAPTION: caption})
    del pipeline
    _free()


def _encode_pixels(
    wish: Wish,
    family: Diffusion,
    config: Mapping[str, Any],
    pipeline: Any,
    works: Sequence[Work],
    found: Found,
) -> int:
    """Encode pictures, each with its prompt into its own file. Returns how many."""
    if wish.dtype == "fp16" and getattr(pipeline.vae.config, "force_upcast", False):
        # Its activations overflow in half precision.
        pipeline.vae.to(torch.float32)
    _to_device(pipeline, wish.device)
    written = 0
    for work in tqdm(works, unit="sample", disable=None):
        prompt_file = _prompt_file(wish, work)
        try:
            pixels = load_placed(work.sample, work.placement, work.frames)
        except ModelSourceError as error:
            found.skip(work.sample.source, error)
            continue
        finally:
            prompt = load_file(prompt_file)
        with torch.inference_mode():
            encoded = family.encode_pixels(pipeline, pixels)
        encoded = family.placed(encoded, work.placement.original, work.placement.corner)
        tensors = {**_stored(encoded, wish, ()), **prompt}
        if written == 0:
            family.check_sample(config, tensors, work.sample.source)
        write_tensors(work.path, tensors, work.metadata)
        prompt_file.unlink()
        written += 1
    return written


def _stored(
    tensors: Mapping[str, Tensor], wish: Wish, prompts: Iterable[str]
) -> dict[str, Tensor]:
    """Bring tensors to the CPU and the stored type: not sizes, which 8 bits would round.

    Raises:
        ModelSourceError: a tensor holds NaN or infinity.
    """
    found, kept = {}, set(prompts)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelSourceError(
                f"{name} came out as NaN or infinity; run again with --dtype bf16 or fp32."
            )
        large = tensor.is_floating_point() and (tensor.ndim > 1 or name in kept)
        found[name] = tensor.to("cpu", DTYPES[wish.dtype] if large else tensor.dtype).contiguous()
    return found


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file: whole under its final name, or not at all.

    Raises:
        ModelSourceError: the folder cannot be written to.
    """
    with blame(f"{path}: cannot be written", "free space or choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several of these programs may fill one folder.
        with whole_file(path, shared=True) as partial:
            save_file(tensors, partial, metadata=dict(metadata))


def _work_model(wish: Wish) -> dict[str, str]:
    """What the encoding of a caption depends on."""
    return {
        "model": str(wish.model.resolve()),
        "model_type": wish.model_type,
        "dtype": wish.dtype,
    }


def _prompt_file(wish: Wish, work: Work) -> Path:
    # Not called .safetensors: the data set would take it for a sample.
    return wish.output / PROMPTS / f"{work.sample.name}.prompt"


def _to_device(pipeline: Any, device: str) -> None:
    pipeline.to(device)


def _free() -> None:
    """Give back the memory of a pipeline that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
