"""Pictures, frames and videos as tensors, placed in their bucket."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dist_layerlr.errors import ModelSourceError
from launch.trainer.cli import blame
from launch.trainer.data.images import Source, image_size, open_image, to_pixels
from launch.trainer.data.sizes import Placement

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What a source's headers say."""

    size: tuple[int, int]
    """Height and width as shown."""
    frames: int
    """How many there are; 1 for an image."""
    fps: float | None
    """Frames per second; None: a folder of frames or an image does not say."""


def video_problem() -> str | None:
    """Why videos cannot be read here; None where they can."""
    if find_spec("av") is None:
        return "no installed library reads videos: pip install av, or give a folder of its frames"
    return None


def measure(source: Source) -> Measures:
    """Read height, width and number of frames of a source.

    Raises:
        ModelSourceError: a file is damaged, or frames differ in size.
    """
    if source.video is not None:
        return _measure_video(source.video)
    sizes = {path: image_size(path) for path in source.frames}
    first = sizes[source.frames[0]]
    for path, size in sizes.items():
        if size != first:
            raise ModelSourceError(
                f"{path.name} is of another size than {source.frames[0].name}; bring all frames of"
                " a clip to one size"
            )
    return Measures(size=first, frames=len(source.frames), fps=None)


def _measure_video(path: Path) -> Measures:
    step = "encode it again, upright"
    with _opened(path) as stream, blame(f"{path}: not a readable video", step):
        first = next(stream.container.decode(stream))
        # The decoder gives the picture as it was stored, not as players turn it.
        turned = getattr(first, "rotation", 0)
        if turned:
            raise ValueError(f"it is to be turned by {turned} degrees")
        # Some containers do not say how many frames follow.
        frames = stream.frames or 1 + sum(1 for _ in stream.container.decode(stream))
        rate = stream.average_rate
    fps = float(rate) if rate else None
    return Measures(size=(first.height, first.width), frames=frames, fps=fps)


def load_placed(source: Source, placement: Placement, frames: int) -> Tensor:
    """Load the first frames of a source as (3, F, H, W), float32 in [-1, 1].

    Raises:
        ModelSourceError: a file is damaged.
    """
    images = _video_images(source.video) if source.video else map(open_image, source.frames)
    found = [to_pixels(_placed(image, placement)) for image in islice(images, frames)]
    if len(found) < frames:
        raise ModelSourceError(f"{len(found)} frames can be read, need {frames}; replace the clip")
    return torch.stack(found, dim=1)


def load_sound(path: Path) -> tuple[Tensor, int]:
    """Load a WAV file of 16 or 32 bit as (channels, N) in [-1, 1], and its rate.

    Raises:
        ModelSourceError: the file is damaged, or of another kind.
    """
    with blame(f"{path}: not a readable WAV file", "convert it to 16-bit PCM"):
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = bytearray(file.readframes(file.getnframes()))
        kinds = {2: torch.int16, 4: torch.int32}
        if width not in kinds:
            raise ValueError(f"{8 * width} bits a number")
        numbers = torch.frombuffer(raw, dtype=kinds[width]).view(-1, channels)
    return numbers.T.to(torch.float32) / 2.0 ** (8 * width - 1), rate


def _placed(image: Image.Image, placement: Placement) -> Image.Image:
    (height, width), (top, left) = placement.size, placement.corner
    if image.size[::-1] != placement.scaled:
        image = image.resize(placement.scaled[::-1], Image.Resampling.LANCZOS)
    return image.crop((left, top, left + width, top + height))


class _Stream:
    """The first video stream of a file, open while inside."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        import av

        with blame(f"{self._path}: not a readable video", "replace or remove it"):
            self._container = av.open(str(self._path))
            return self._container.streams.video[0]

    def __exit__(self, *_: object) -> None:
        self._container.close()


def _opened(path: Path) -> _Stream:
    return _Stream(path)


def _video_images(path: Path) -> Iterator[Image.Image]:
    with _opened(path) as stream, blame(f"{path}: not a readable video", "replace or remove it"):
        for frame in stream.container.decode(stream):
            yield frame.to_image()
