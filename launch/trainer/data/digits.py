"""Moving digits: short clips of real handwriting, for the quickstart and the tests.

They need no download.
The scans are scikit-learn's bundled ``load_digits`` (8x8 pixels, real people's digits). One of them
bounces about a dark square canvas. There is no text encoder: each of the 14 words below has a fixed
random embedding, and a prompt such as "seven backslash" is the two embeddings of its words. (One
word would do no good: attention over a single key has no gradient for its queries and keys.)

A path word says along which line the digit moves but not which way. Video transformers with rotary
positions know only how far apart two frames are, so one this small cannot be told by a prompt which
end of a clip comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PATHS = {"across": (0, 1), "upright": (1, 0), "slash": (-1, 1), "backslash": (1, 1)}
"""Word -> (down, right) direction; a clip follows it forwards or backwards."""
VOCABULARY = (*DIGIT_WORDS, *PATHS)
SCAN = 8
"""Height and width of a scan in pixels."""

_WORD_STREAM, _CLIP_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What one sample shows."""

    digit: int
    """0 to 9."""
    path: str
    """Key of ``PATHS``."""
    scan: int
    """Row of ``load_digits().images``."""
    start: tuple[int, int]
    """(top, left) pixel in frame 0."""
    velocity: tuple[int, int]
    """(down, right) pixels per frame in frame 0."""


@dataclass(frozen=True, kw_only=True)
class MovingDigits:
    """Clips of one bouncing digit, each a function of (seed, index) alone. Satisfies ``Dataset``.

    Raises:
        ConfigError: a field is out of range.
    """

    clips: int = 1000
    """Samples in the dataset, 1 to 1000000; digits take turns."""
    frames: int = 5
    """Frames in a clip, 1 to 64."""
    canvas: int = 12
    """Height and width in pixels, 8 to 64."""
    speed: int = 1
    """Pixels per frame along each axis that the path follows, 1 to 8."""
    starts: int = 1
    """Starting places along each axis, 1 to 64, whole steps from the edge behind the digit; 1 means
    that edge."""
    scans_per_digit: int = 3
    """Different scans of each digit in use, 1 to 174. A few minutes on a CPU suffice for a few of
    them."""
    text_dim: int = 32
    """Width of the word embeddings, 4 to 4096; equals the model's ``text_dim``."""
    seed: int = 0
    """0 or more."""

    def __post_init__(self) -> None:
        """Check every field against its range."""
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise fields.invalid(f"data.{field}", value, f"an integer in [{low}, {high}]")

    def __len__(self) -> int:
        """Return the number of clips."""
        return self.clips

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``latents`` (1, F, H, W) and ``prompt_embeds`` (2, text_dim).

        Latents are in [-1, 1], and -1 is the dark background.

        Raises:
            IndexError: ``index`` is not in [0, len).
        """
        clip = self.clip(index)
        canvas = torch.full((1, self.frames, self.canvas, self.canvas), -1.0)
        picture = torch.from_numpy(_scans()[0][clip.scan]) / 8 - 1  # (8, 8)
        for frame in range(self.frames):
            top, left = (
                self._bounce(at, by, frame)
                for at, by in zip(clip.start, clip.velocity, strict=True)
            )
            canvas[0, frame, top : top + SCAN, left : left + SCAN] = picture
        words = [VOCABULARY.index(word) for word in self.name(index).split()]
        return {"latents": canvas, "prompt_embeds": _embeddings(self.seed, self.text_dim)[words]}

    def name(self, index: int) -> str:
        """Return the prompt, for instance ``"seven backslash"``."""
        clip = self.clip(index)
        return f"{DIGIT_WORDS[clip.digit]} {clip.path}"

    def key(self, index: int) -> str:
        """Return everything that a sample shows; several samples show the same."""
        return repr(self.clip(index))

    def clip(self, index: int) -> Clip:
        """Return what sample ``index`` shows.

        Raises:
            IndexError: ``index`` is not in [0, len).
        """
        if not 0 <= index < self.clips:
            raise IndexError(f"Sample {index} of {self.clips} clips.")
        # A generator of its own for each clip, so that the order of reads does not matter.
        random = np.random.default_rng([self.seed, _CLIP_STREAM, index])
        digit = index % len(DIGIT_WORDS)
        scans = np.flatnonzero(_scans()[1] == digit)[: self.scans_per_digit]
        path, way = str(random.choice(list(PATHS))), int(random.choice((-1, 1)))
        (top, down), (left, right) = (self._line(sign * way, random) for sign in PATHS[path])
        return Clip(
            digit=digit,
            path=path,
            scan=int(random.choice(scans)),
            start=(top, left),
            velocity=(down, right),
        )

    def _line(self, sign: int, random: np.random.Generator) -> tuple[int, int]:
        """Draw a start on one axis and its velocity.

        The start lies whole steps from the edge behind the digit, or in the middle if sign is 0.
        """
        room = self.canvas - SCAN
        places = min(self.starts, max(room // self.speed, 1))
        start = self.speed * int(random.integers(places))
        if sign == 0:
            return room // 2, 0
        # The edge behind a digit that moves down or right is at 0, else at the other end.
        return (start if sign > 0 else room - start), sign * self.speed

    def _bounce(self, start: int, velocity: int, frame: int) -> int:
        """Return the position at ``frame``, reflected at both edges."""
        room = self.canvas - SCAN
        if room == 0:
            return 0
        # On a line of twice the length, whose second half runs back, nothing is ever reflected.
        place = (start + velocity * frame) % (2 * room)
        return min(place, 2 * room - place)


_RANGES = (
    ("clips", 1, 1_000_000),
    ("frames", 1, 64),
    ("canvas", SCAN, 64),
    ("speed", 1, 8),
    ("starts", 1, 64),
    ("scans_per_digit", 1, 174),
    ("text_dim", 4, 4096),
    ("seed", 0, 2**31 - 1),
)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the scans (1797, 8, 8) float32 in 0 to 16 and their digits (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data.kind='digits' needs scikit-learn. Install the train extra."
        ) from error
    bundle = load_digits()
    return bundle.images.astype(np.float32), bundle.target


@lru_cache(maxsize=8)
def _embeddings(seed: int, text_dim: int) -> Tensor:
    """Return one fixed standard normal row per word: (14, text_dim)."""
    random = np.random.default_rng([seed, _WORD_STREAM])
    return torch.from_numpy(random.standard_normal((len(VOCABULARY), text_dim), dtype=np.float32))
