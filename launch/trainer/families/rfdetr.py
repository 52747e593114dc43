"""RF-DETR, by the package of that name: its model, its data path, its criterion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.files import read_json
from launch.trainer.cli import blame
from launch.trainer.data.base import Batch, Sample
from launch.trainer.data.coco import IMAGE, TARGET
from launch.trainer.families.checks import check_shape
from launch.trainer.families.plain import Plain, as_json
from launch.trainer.objectives import Objective
from launch.trainer.objectives.detection import TARGETS, Detection

NAME, BACKBONE, CLASSES = "model_name", "backbone", "num_classes"
"""Keys of config.json beside the fields of the package's own config: the model's class, and sizes
of a DINOv2 other than the package's (``launch/tiny.py`` writes one)."""
PADDING = "padding"
"""Field of a batch: (B, H, W) bool, True beside an image."""
CHECKPOINT = "rf-detr.pth"
"""What ``RFDETR.from_checkpoint`` takes, beside the safetensors of a result."""
_PRIOR = -math.log(99)
"""A new head's bias: a class is there with 1 %, with which the package begins as well."""


@dataclass(frozen=True, kw_only=True)
class RFDETR(Plain):
    """A detector of the package with a head of ``classes``; None: of the checkpoint's."""

    classes: int | None = None
    model_type: ClassVar[str] = "rfdetr"
    objective_class: ClassVar[type] = Detection

    def variant(self, settings: Mapping[str, Any]) -> RFDETR:
        """Return the family with the head that the config asks for; see ``HasVariants``."""
        return RFDETR(classes=settings.get("classes"))

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse what is no detector of the package; see ``Family.check_config``."""
        settings = _settings(model_config)
        for key in ("segmentation_head", "use_grouppose_keypoints"):
            if getattr(settings, key):
                raise ModelSourceError(
                    f"config.json of model_path has {NAME}={model_config[NAME]!r}, whose {key} is"
                    " not trained here: train it with the package, and give it this library's"
                    " groups, or choose a detector."
                )

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network, its head of ``classes``; see ``Family.build``."""
        return _build(model_config, self.classes)

    def checkpoint_blocks(self, model: nn.Module) -> None:
        """Turn on that of the encoder, which has all of the blocks that weigh; see ``Family``."""
        from transformers import PreTrainedModel

        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                Plain.checkpoint_blocks(self, module)

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...] | str:
        """Return the projections of the encoder's attentions; see ``Family.lora_targets``."""
        return ("query", "key", "value")

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the token of masked patches, which detection never masks; see ``Family``."""
        return ("backbone.0.encoder.encoder.embeddings.mask_token",)

    def fresh_weights(self, model_config: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the heads of another number of classes; see ``HasFreshWeights``."""
        if self.classes is None or self.classes == _settings(model_config).num_classes:
            return {}
        stored = dict(_build(model_config, None).named_parameters())
        wanted = dict(_build(model_config, self.classes).named_parameters())
        anew = [name for name, p in wanted.items() if p.shape != stored[name].shape]
        return dict.fromkeys(anew, _PRIOR)

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make the objective with the package's criterion and its own weights of losses."""
        file = model_folder / "config.json"
        known = read_json(file) if file.is_file() else {NAME: "RFDETRNano"}
        made = _settings(known, settings.get("classes"))
        from rfdetr.models.lwdetr import build_criterion_from_config

        criterion, _ = build_criterion_from_config(made, _train_config())
        return Detection(predict=_predict, criterion=criterion, **settings)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad the images to one size, as the package does; targets stay a list."""
        from rfdetr.utilities.tensors import nested_tensor_from_tensor_list

        images = nested_tensor_from_tensor_list([one[IMAGE] for one in samples])
        targets = [one[TARGET] for one in samples]
        return {IMAGE: images.tensors, PADDING: images.mask, TARGETS: targets}

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Count the patches of an image; see ``Family.tokens``."""
        height, width = sample[IMAGE].shape[-2:]
        patch = _settings(model_config).patch_size
        return int(height // patch) * int(width // patch)

    def example(self, model_config: Mapping[str, Any], sizes: Mapping[str, int]) -> Sample:
        """Return an image on the meta device; see ``HasExample``."""
        image = torch.empty(3, sizes["R"], sizes["R"], device="meta")
        boxes = torch.empty(1, 4, device="meta")
        return {IMAGE: image, TARGET: {"labels": torch.zeros(1).long(), "boxes": boxes}}

    def fit_data(self, model_config: Mapping[str, Any], data: Any) -> None:
        """Give images the model's size, and refuse another number of classes; see ``FitsData``."""
        settings, names = _settings(model_config), getattr(data, "classes", None)
        if names is None or not getattr(data, "has_boxes", False):
            raise ConfigError("Invalid data.kind: model_type='rfdetr' is trained on 'coco'.")
        if len(names) != settings.num_classes:
            raise ConfigError(
                f"Invalid data.folder: it has {len(names)} categories, and the model's head"
                f" {settings.num_classes}. Set objective.classes={len(names)} for a new head, or"
                " another folder."
            )
        data.give_size(settings.resolution, settings.patch_size, settings.num_windows)

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse images of another size than the model's; see ``Family.check_sample``."""
        side = _settings(model_config).resolution
        check_shape(sample, IMAGE, (3, side, side), label, "use data.kind='coco'")

    def write_beside(self, model_config: Mapping[str, Any], folder: Path, result: Path) -> None:
        """Write the config of the new head and the package's own kind of file."""
        from safetensors.torch import load_file

        stored = read_json(folder / "config.json")
        classes = _settings(model_config).num_classes
        (result / "config.json").write_bytes(as_json({**stored, CLASSES: classes}))
        kept = {key: value for key, value in stored.items() if key not in (NAME, BACKBONE)}
        saved = {
            "model": load_file(str(result / "model.safetensors")),
            "args": {CLASSES: classes},
            NAME: stored[NAME],
            "model_config": {**kept, CLASSES: classes},
        }
        torch.save(saved, result / CHECKPOINT)


@contextmanager
def backbone_of(sizes: Mapping[str, Any] | None) -> Iterator[None]:
    """Have the package build a DINOv2 of other sizes than those that it knows.

    Args:
        sizes: What differs in the config of its DINOv2, ``hidden_size`` among it; None: nothing.
    """
    if not sizes:
        yield
        return
    import rfdetr.models.backbone.dinov2 as package

    known, widths = package.get_config, dict(package.size_to_width)
    package.get_config = lambda *given: {**known(*given), **sizes}
    package.size_to_width.update(dict.fromkeys(widths, sizes["hidden_size"]))
    try:
        yield
    finally:
        package.get_config = known
        package.size_to_width.update(widths)


def _build(model_config: Mapping[str, Any], classes: int | None) -> nn.Module:
    settings = _settings(model_config, classes)
    from rfdetr.models.lwdetr import build_model_from_config

    # The package sets initial values in ways that only a device context keeps off the memory.
    with backbone_of(model_config.get(BACKBONE)), torch.device("meta"):
        model: Any = build_model_from_config(settings, _train_config())
    # Its one buffer is for keypoints, and empty for a detector.
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    model.config = {**model_config, CLASSES: settings.num_classes}
    return model  # type: ignore[no-any-return]


def _predict(model: nn.Module, batch: Batch) -> Mapping[str, Any]:
    from rfdetr.utilities.tensors import NestedTensor

    said: Mapping[str, Any] = model(NestedTensor(batch[IMAGE], batch[PADDING]), batch[TARGETS])
    return said


def _settings(model_config: Mapping[str, Any], classes: int | None = None) -> Any:
    """Return the package's config object of a ``config.json``."""
    package: Any = _package()
    name = model_config.get(NAME)
    cls = getattr(package, f"{name}Config", None) if isinstance(name, str) else None
    if cls is None:
        raise ModelSourceError(
            f"config.json of model_path has {NAME}={name!r}: needed is a model of the rfdetr"
            ' package, such as {"model_name": "RFDETRNano"}, and what of its config differs.'
        )
    given = {key: value for key, value in model_config.items() if key not in (NAME, BACKBONE)}
    if classes is not None:
        given[CLASSES] = classes
    # With a name, the package builds everything at random and opens no file; it is never read.
    fixed = {"pretrain_weights": "none.pth", "device": "cpu"}
    with blame("config.json of model_path does not fit the rfdetr package", "mend it"):
        return cls(**{**given, **fixed})


@cache
def _train_config() -> Any:
    return _package().TrainConfig(dataset_dir=".", output_dir=".")


def _package() -> Any:
    try:
        import rfdetr.config as package
        from rfdetr.utilities.logger import get_logger
    except ImportError as error:
        raise ConfigError(
            f"model_type='rfdetr' needs {error.name}. Run: pip install -e \".[families]\""
        ) from None
    # It warns that it does not load a DINOv2 whose weights come from model_path.
    get_logger().setLevel("ERROR")
    return package
