"""Images in one folder for each class."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from launch.trainer.data.images import IMAGE_SUFFIXES, open_image, to_pixels
from launch.trainer.objectives.classes import LABEL

PIXELS = "pixels"
"""Field of a sample: (3, H, W), float32 in [0, 1]; the family normalises."""


class ClassFolders:
    """Images of several classes, whose names are those of their folders. Satisfies ``Dataset``.

    Classes are numbered in the order of their names. An image is scaled so that it covers the
    model's size, and cropped at the centre.

    Raises:
        ConfigError: a field is out of range, no such folder, or one without images.
    """

    def __init__(self, folder: str, size: int | None = None) -> None:
        """List the images.

        Args:
            folder: Holds one folder for each class.
            size: Height and width of a sample, in pixels; None: the model's own.
        """
        root = Path(folder)
        if not root.is_dir():
            raise fields.invalid("data.folder", folder, "a folder that holds one for each class")
        shown = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.classes = [path.name for path in shown]
        self._files: list[tuple[Path, int]] = []
        for number, path in enumerate(shown):
            images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise ConfigError(
                    f"Invalid data.folder={folder!r}: {path.name}/ holds no image"
                    f" ({', '.join(sorted(IMAGE_SUFFIXES))}). Fill it, or remove it."
                )
            self._files += [(image, number) for image in images]
        if not self.classes:
            raise fields.invalid("data.folder", folder, "a folder that holds one for each class")
        self._size: tuple[int, int] | None = None
        if size is not None:
            side = fields.integer(1)("data.size", size)
            self._size = (side, side)

    def give_size(self, height: int, width: int) -> None:
        """Take the model's size, where the config gives none."""
        self._size = self._size or (height, width)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``pixels`` (3, H, W) in [0, 1] and ``label``, a scalar."""
        path, label = self._files[index]
        image = open_image(path)
        if self._size is not None:
            height, width = self._size
            image = ImageOps.fit(image, (width, height), method=Image.Resampling.BICUBIC)
        return {PIXELS: (to_pixels(image) + 1) / 2, LABEL: torch.tensor(label)}

    def name(self, index: int) -> str:
        """Return class and file of an image."""
        path, label = self._files[index]
        return f"{self.classes[label]}/{path.name}"
