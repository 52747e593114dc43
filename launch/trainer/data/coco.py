"""Images with boxes, annotated as COCO's are, by RF-DETR's own data path."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from launch.trainer.cli import blame

IMAGE, TARGET = "image", "target"
"""Fields of a sample: (3, R, R) float32, normalised, and a mapping of tensors."""
ANNOTATIONS = "_annotations.coco.json"


class CocoBoxes:
    """Images of one folder with their boxes. Satisfies ``Dataset``.

    Images are scaled to the model's square and normalised, and boxes become (centre, size) in
    [0, 1], by the package's transforms of a training set without its random ones: a sample must be
    the same whenever it is read. Categories are numbered as the package does, without those that
    only group others.

    Raises:
        ConfigError: no such folder or annotations, or the package is not installed.
        ModelSourceError: annotations that cannot be read.
    """

    has_boxes = True
    """Other data sets have classes as well."""

    def __init__(self, folder: str, annotations: str = ANNOTATIONS) -> None:
        """Read the annotations.

        Args:
            folder: Holds the images.
            annotations: The JSON file, relative to the folder.
        """
        self._folder, self._file = Path(folder), Path(folder) / annotations
        if not self._file.is_file():
            raise fields.invalid(
                "data.folder", folder, f"a folder of images with {annotations} in it"
            )
        self._samples: Any = self._opened(None)
        if not len(self._samples):
            raise ConfigError(f"Invalid data.folder={folder!r}: {annotations} lists no image.")
        kept = self._samples.label2cat
        self.classes = [str(self._samples.coco.cats[kept[i]]["name"]) for i in sorted(kept)]

    def give_size(self, side: int, patch: int, windows: int) -> None:
        """Take the model's size: pixels of its square and of a patch, and its windows."""
        from rfdetr.datasets.coco import make_coco_transforms_square_div_64

        transforms = make_coco_transforms_square_div_64(
            "train",
            side,
            patch_size=patch,
            num_windows=windows,
            # No flips and no crops; None would be the package's own.
            **{"aug_config": {}, "scale_jitter": False},
        )
        self._samples = self._opened(transforms)

    def _opened(self, transforms: Any) -> Any:
        try:
            from rfdetr.datasets.coco import CocoDetection
        except ImportError as error:
            raise ConfigError(
                f"data.kind='coco' needs {error.name}. Run: pip install -e \".[families]\""
            ) from None
        # pycocotools prints what it does.
        with (
            blame(f"Cannot read {str(self._file)!r}", "it must be in COCO's format"),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            return CocoDetection(
                self._folder, self._file, transforms=transforms, remap_category_ids=True
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``image`` and ``target``: labels, boxes and what else the criterion takes."""
        with blame(f"{self.name(index)}: cannot be read", "replace or remove it"):
            image, target = self._samples[index]
        return {IMAGE: image, TARGET: target}

    def name(self, index: int) -> str:
        """Return the file of an image."""
        number = self._samples.ids[index]
        return str(self._samples.coco.imgs[number]["file_name"])
