"""Everything below a folder that can be encoded, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_layerlr.errors import ModelSourceError
from launch.trainer.data.cached import EMPTY_PROMPT
from launch.trainer.data.clips import VIDEO_SUFFIXES, video_problem
from launch.trainer.data.images import (
    IMAGE_SUFFIXES,
    Source,
    clip_sample,
    image_sample,
    video_sample,
)

AUDIO_SUFFIX = ".wav"
_CAPTION_SUFFIX = ".txt"
_CLIP_CAPTION = "caption.txt"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that was not encoded."""

    path: str
    """Relative to the input folder."""
    why: str
    """In one line."""


@dataclass(kw_only=True)
class Found:
    """What a folder holds."""

    samples: list[Source] = field(default_factory=list)
    """By name."""
    skipped: list[Skipped] = field(default_factory=list)

    def skip(self, path: str, error: Exception) -> None:
        """Note a file that cannot be encoded."""
        # Some errors begin with the file themselves.
        why = " ".join(str(error).split()).removeprefix(f"{path}: ")
        self.skipped.append(Skipped(path=path, why=why))


def gather(folder: Path) -> Found:
    """List images, videos and folders of frames, those in sub-folders too.

    A sub-folder with ``caption.txt``, or with a caption of its own name beside it, is one clip of
    frames; any other is looked through for samples.

    Raises:
        ModelSourceError: the folder is missing, or holds nothing that can be encoded.
    """
    if not folder.is_dir():
        raise ModelSourceError(
            f"Invalid --input {str(folder)!r}: not a folder; give the folder of images or clips."
        )
    found, by_name = Found(), dict[str, str]()
    for path in _candidates(folder):
        shown = path.relative_to(folder)
        name = shown.as_posix() if path.is_dir() else shown.with_suffix("").as_posix()
        try:
            _refuse_name(name, by_name.setdefault(name, shown.as_posix()), shown)
            sample = _sample(path)
        except ModelSourceError as error:
            found.skip(shown.as_posix(), error)
            continue
        audio = path.with_suffix(AUDIO_SUFFIX)
        found.samples.append(
            replace(
                sample,
                name=name,
                source=shown.as_posix(),
                audio=audio if audio.is_file() else None,
            )
        )
    if not found.samples:
        reasons = [f"{one.path}: {one.why}" for one in found.skipped[:1]]
        raise ModelSourceError(
            f"Invalid --input {str(folder)!r}: found 0 images ({', '.join(IMAGE_SUFFIXES)}), videos"
            f" or folders of frames that can be encoded, of {len(found.skipped)} files"
            f" {''.join(reasons)}; need at least 1."
        )
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield what is a sample or should have been one, in order."""
    # Hidden files, such as macOS's ._cat.png, are nobody's samples.
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    beside = (_CAPTION_SUFFIX, AUDIO_SUFFIX)
    stems = {path.stem for path in entries if path.suffix.lower() not in beside}
    for path in entries:
        if path.is_dir():
            captions = (path / _CLIP_CAPTION, path.with_name(f"{path.name}{_CAPTION_SUFFIX}"))
            is_clip = any(caption.is_file() for caption in captions)
            yield from [path] if is_clip else _candidates(path)
        elif path.suffix.lower() not in beside or path.stem not in stems:
            yield path


def _sample(path: Path) -> Source:
    """Read the caption of one candidate.

    Raises:
        ModelSourceError: it has none, or is nothing that can be encoded.
    """
    if path.is_dir():
        return clip_sample(path)
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return image_sample(path)
    if suffix in VIDEO_SUFFIXES:
        problem = video_problem()
        if problem is not None:
            raise ModelSourceError(problem)
        return video_sample(path)
    if suffix == _CAPTION_SUFFIX:
        raise ModelSourceError("a caption without an image, video or folder of its name")
    raise ModelSourceError(f"{suffix or 'no suffix'}: neither an image nor a video")


def _refuse_name(name: str, first: str, shown: Path) -> None:
    """Refuse a second sample of one name, and the name of the empty prompt."""
    if first != shown.as_posix():
        raise ModelSourceError(
            f"would be written to {name}.safetensors like {first}; rename one of them"
        )
    if f"{shown.stem}.safetensors" == EMPTY_PROMPT:
        raise ModelSourceError(f"{EMPTY_PROMPT} is the empty prompt's file; rename it")
