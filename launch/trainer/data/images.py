"""Folders of captioned images and clips, as ``launch/cache_latents.py`` reads them.

A folder holds images (``cat.png`` and ``cat.txt``), clips (a sub-folder of numbered frames, with
``caption.txt`` inside or ``<folder>.txt`` beside it), or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan import natural_key
from launch.trainer.cli import blame
from launch.trainer.data.encode import ClipSize

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# The EXIF tag of a camera's orientation, and its values that swap height and width.
_EXIF_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image or one clip of the input folder, with its caption."""

    name: str
    """Stem of the output file."""
    frames: tuple[Path, ...]
    """Image files in temporal order; one for an image."""
    caption: str
    """Text with runs of white space made single spaces; may be empty."""
    source: str
    """Image, video or clip folder, relative to the input folder."""
    video: Path | None = None
    """A video file; then there are no ``frames``."""
    audio: Path | None = None
    """A sound file of the same name."""


def find_samples(folder: Path) -> list[Source]:
    """List the images and clips of a folder, sorted by name; only captions are read.

    Raises:
        ModelSourceError: the folder is missing or holds no sample, a caption is missing, or two
            samples share a name.
    """
    if not folder.is_dir():
        raise ModelSourceError(
            f"Invalid --input {str(folder)!r}: not a folder; give the folder of images or clips."
        )
    # Hidden files, such as macOS's ._cat.png, are no images.
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    samples = [image_sample(path) for path in entries if _is_image(path)]
    samples += [clip_sample(path) for path in entries if path.is_dir()]
    if not samples:
        raise ModelSourceError(
            f"Invalid --input {str(folder)!r}: found 0 images ({', '.join(IMAGE_SUFFIXES)}) and 0"
            " sub-folders of frames; need at least 1."
        )
    by_name: dict[str, Source] = {}
    for sample in samples:
        other = by_name.setdefault(sample.name, sample)
        if other is not sample:
            raise ModelSourceError(
                f"Invalid --input {str(folder)!r}: {other.source} and {sample.source} would both be"
                f" written to {sample.name}.safetensors; rename one of them."
            )
    return [by_name[name] for name in sorted(by_name)]


def cut_frames(samples: Sequence[Source], frames: int | None) -> list[Source]:
    """Keep the first ``frames`` frames of every sample; None keeps all.

    Raises:
        ModelSourceError: a sample has fewer.
    """
    for sample in samples:
        if frames is not None and len(sample.frames) < frames:
            found = f"{sample.source}: has {len(sample.frames)} frames"
            raise ModelSourceError(
                f"{found}, need --frames={frames}; lower --frames or remove the clip."
            )
    return [replace(sample, frames=sample.frames[:frames]) for sample in samples]


def common_size(samples: Sequence[Source], height: int | None, width: int | None) -> ClipSize:
    """Find the one size of all samples, from image headers where ``height`` and ``width`` are None.

    Raises:
        ModelSourceError: an image cannot be read, or frame counts or image sizes differ.
    """
    first = samples[0]
    for sample in samples:
        if len(sample.frames) != len(first.frames):
            raise ModelSourceError(
                f"{sample.source}: has {len(sample.frames)} frames, {first.source} has"
                f" {len(first.frames)}; all need the same number; set --frames, and keep images and"
                " clips in separate folders."
            )
    # All headers are read even if --height is given: a damaged file is found before any encoding.
    sizes = {path: image_size(path) for sample in samples for path in sample.frames}
    if height is not None and width is not None:
        return ClipSize(frames=len(first.frames), height=height, width=width)
    path, (height, width) = next(iter(sizes.items()))
    for other, size in sizes.items():
        if size != (height, width):
            raise ModelSourceError(
                f"{other}: is {size[1]}x{size[0]} pixels, {path} is {width}x{height}; "
                "all need one size; set --height and --width to resize and crop."
            )
    return ClipSize(frames=len(first.frames), height=height, width=width)


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels as the image is shown; reads the header, or all of a PNG.

    Raises:
        ModelSourceError: the file is no readable image.
    """
    with blame(f"{path}: not a readable image", "replace or remove it"), Image.open(path) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION) in _QUARTER_TURNS
        width, height = image.size
        return (width, height) if turned else (height, width)


def load_clip(paths: Sequence[Path], height: int, width: int) -> Tensor:
    """Load frames as (3, F, height, width), float32 in [-1, 1].

    They are scaled to cover the size and cropped at the centre.

    Raises:
        ModelSourceError: a file is no readable image.
    """
    return torch.stack([_load_frame(path, height, width) for path in paths], dim=1)


def open_image(path: Path) -> Image.Image:
    """Decode an image as the camera held it, which is how ``image_size`` counts.

    Raises:
        ModelSourceError: the file is no readable image.
    """
    with blame(f"{path}: not a readable image", "replace or remove it"), Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def to_pixels(image: Image.Image) -> Tensor:
    """Return an image as (3, H, W), float32 in [-1, 1]."""
    # A copy that can be written to: torch.frombuffer shares the memory.
    pixels = bytearray(image.tobytes())
    frame = torch.frombuffer(pixels, dtype=torch.uint8).view(image.height, image.width, 3)
    return frame.permute(2, 0, 1).to(torch.float32) / 127.5 - 1.0


def _load_frame(path: Path, height: int, width: int) -> Tensor:
    image = open_image(path)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)
    return to_pixels(image)


def _is_image(path: Path) -> bool:
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )


def image_sample(path: Path) -> Source:
    """Return an image with its caption.

    Raises:
        ModelSourceError: it has none.
    """
    caption = _read_caption(path.name, [path.with_suffix(".txt")])
    return Source(name=path.stem, frames=(path,), caption=caption, source=path.name)


def video_sample(path: Path) -> Source:
    """Return a video file with its caption.

    Raises:
        ModelSourceError: it has none.
    """
    caption = _read_caption(path.name, [path.with_suffix(".txt")])
    return Source(name=path.stem, frames=(), caption=caption, source=path.name, video=path)


def clip_sample(folder: Path) -> Source:
    """Return a folder of frames with its caption.

    Raises:
        ModelSourceError: it has none, or no frames.
    """
    # Natural order: frame 2 comes before frame 10, however many zeros the names carry.
    images = filter(_is_image, folder.iterdir())
    frames = tuple(sorted(images, key=lambda path: natural_key(path.name)))
    if not frames:
        raise ModelSourceError(
            f"{folder}: holds 0 frames ({', '.join(IMAGE_SUFFIXES)}); add frames or move it away."
        )
    caption = _read_caption(
        folder.name, [folder / "caption.txt", folder.parent / f"{folder.name}.txt"]
    )
    return Source(name=folder.name, frames=frames, caption=caption, source=folder.name)


def _read_caption(source: str, places: Sequence[Path]) -> str:
    for place in places:
        if place.is_file():
            with blame(f"{place}: caption is not UTF-8 text", "save it as UTF-8"):
                return " ".join(place.read_text(encoding="utf-8").split())
    raise ModelSourceError(
        f"{source}: no caption; write one to {' or '.join(str(place) for place in places)}."
    )
