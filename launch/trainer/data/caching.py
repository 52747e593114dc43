"""Encodes a folder with a pipeline's own VAE and text encoders, one after the other.

Text encoders come first and are gone before the VAE runs, since both may not fit on one device.
What they made waits in a hidden folder beside the samples, so that a run that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
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
from launch.trainer.data.cached import CAPTION, EMPTY_PROMPT, UNFINISHED, read_header
from launch.trainer.data.clips import load_placed, load_sound
from launch.trainer.data.images import Source
from launch.trainer.data.pipelines import (
    PIXEL_PARTS,
    TEXT_PARTS,
    Cuts,
    free_memory,
    load_parts,
    missing_cleaners,
    read_index,
)
from launch.trainer.data.sources import gather
from launch.trainer.data.works import (
    DTYPES,
    Report,
    Wish,
    Work,
    check_metadata,
    grid_of,
    is_missing,
    model_metadata,
    plan,
)
from launch.trainer.families import get_family
from launch.trainer.families.diffusion import Diffusion, Origin

PROMPTS = ".prompts"
"""Hidden sub-folder of prompts whose picture is not encoded yet."""


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
    grid = grid_of(wish, family, config, pixels)
    works = plan(wish, grid, report)
    missing = [work for work in works if is_missing(work, wish.overwrite)]
    report.enlarged = [work.sample.source for work in missing if work.placement.enlarged]
    report.shortened = [work.sample.source for work in missing if work.frames < work.of_frames]
    if missing:
        begin_writing(wish.output, wish.shard)
    _encode_prompts(wish, family, missing, report)
    _encode_pixels(wish, family, config, pixels, missing, report)
    end_writing(wish.output, wish.shard)
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


def _encode_prompts(wish: Wish, family: Diffusion, works: Sequence[Work], report: Report) -> None:
    """Encode the captions that are not encoded yet, and the empty one."""
    told = model_metadata(wish)
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
    cuts, report.uncleaned = Cuts(pipeline), missing_cleaners(pipeline)
    for path, sample in tqdm(waiting.items(), unit="caption", disable=None):
        prompt = _prompt(family, pipeline, sample.caption, report.uncleaned)
        stored = _stored(prompt, DTYPES[wish.dtype], sample.source, prompt)
        write_sample(path, stored, {**told, CAPTION: sample.caption})
        report.cut += [f"{sample.source} by {name}" for name in sorted(cuts.names)]
        cuts.names.clear()
    del pipeline, cuts
    free_memory()


@torch.inference_mode()
def _prompt(
    family: Diffusion, pipeline: Any, caption: str, missing: Sequence[str]
) -> Mapping[str, Tensor]:
    try:
        return family.encode_prompt(pipeline, caption)
    # Some pipelines use a package whether it is there or not.
    except NameError as error:
        raise ModelSourceError(
            f"{type(pipeline).__name__} cannot encode a caption: {error}; pip install"
            f" {' '.join(missing)}."
        ) from error


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
            pixels = load_placed(work.sample, work.placement, work.frames, work.stride)
            with torch.inference_mode():
                encoded = family.encode_source(pipeline, pixels, _origin(work))
        except ModelSourceError as error:
            report.found.skip(work.sample.source, error)
            continue
        waiting = _prompt_file(wish, work)
        stored = _stored(encoded, DTYPES[wish.dtype], work.sample.source)
        tensors = {**stored, **load_file(waiting)}
        if report.written == 0:
            family.check_sample(config, tensors, work.sample.source)
        write_sample(work.path, tensors, work.metadata)
        waiting.unlink()
        report.written += 1
    if works and not report.written:
        first = report.found.skipped[-1]
        raise ModelSourceError(
            f"None of {len(works)} samples can be encoded; {first.path}: {first.why}"
        )


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


def begin_writing(folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Mark a folder as incomplete until ``end_writing``.

    A process that is killed in between tells nobody, and fewer samples would be trained silently.

    Raises:
        ModelSourceError: the folder cannot be written to.
    """
    mark = folder / f"{UNFINISHED}.{shard[0]}"
    with blame(f"{mark}: cannot be written", "free space or choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()


def end_writing(folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Remove the mark of a process whose samples are all there, or that of an earlier one."""
    # One process alone has written what several may have left unfinished.
    mine = [folder / f"{UNFINISHED}.{shard[0]}"] if shard[1] > 1 else folder.glob(f"{UNFINISHED}.*")
    for mark in list(mine):
        mark.unlink(missing_ok=True)


def remove_empty(folder: Path) -> None:
    """Remove a folder of folders without files; one with files stays, for the next run."""
    inner = sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for path in [*inner, folder]:
        # Another process may be about to write into it.
        with suppress(OSError):
            path.rmdir()


def _prompt_file(wish: Wish, work: Work) -> Path:
    # Not called .safetensors: the data set would take it for a sample.
    return wish.output / PROMPTS / f"{work.sample.name}.prompt"
