"""Image classifiers: timm's models by name, and those of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_layerlr.errors import ConfigError, ModelSourceError
from dist_layerlr.files import read_json
from launch.trainer.data.base import Batch, Sample
from launch.trainer.data.classes import PIXELS
from launch.trainer.families.checks import check_shape
from launch.trainer.families.plain import Plain, as_json, config_of, from_transformers
from launch.trainer.objectives import Objective
from launch.trainer.objectives.classes import LABEL, Classification

_ENDING = "ForImageClassification"
_SPARED, _PATCH = "no_weight_decay", "patch_size"
"""Keys of a live config of timm: what its model says of itself."""
_PREPROCESSOR = "preprocessor_config.json"
_HALVES = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class ViT(Plain):
    """A classifier with a head of ``classes``; None: of the checkpoint's."""

    classes: int | None = None
    model_type: ClassVar[str] = "vit"
    objective_class: ClassVar[type] = Classification
    companions: ClassVar[tuple[str, ...]] = (_PREPROCESSOR,)

    def variant(self, settings: Mapping[str, Any]) -> ViT:
        """Return the family with the head that the config asks for; see ``HasVariants``."""
        return ViT(classes=settings.get("classes"))

    def check_config(self, model_config: Mapping[str, Any]) -> None:
        """Refuse a checkpoint that is no classifier; see ``Family.check_config``."""
        name = model_config.get("architecture")
        if name is None:
            from_transformers(model_config, _ENDING, self.model_type)
        elif not _timm().is_model(name):
            raise ModelSourceError(
                f"config.json of model_path has architecture={name!r}, which timm"
                f" {_timm().__version__} does not know: install a newer release, or mend the name."
            )

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the network, its head of ``classes``; see ``Family.build``."""
        return _build(model_config, self.classes)

    def checkpoint_blocks(self, model: nn.Module) -> None:
        """Turn on the network's own checkpointing; see ``Family.checkpoint_blocks``."""
        enable: Any = getattr(model, "set_grad_checkpointing", None)
        if enable is None:
            super().checkpoint_blocks(model)
        else:
            enable(True)

    def lora_targets(self, model_config: Mapping[str, Any]) -> tuple[str, ...] | str:
        """Return the projections of all attentions; see ``Family.lora_targets``."""
        if "architecture" in model_config:
            return ("attn.qkv", "attn.proj")
        return ("query", "key", "value", "q_proj", "k_proj", "v_proj", "o_proj")

    def without_gradient(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the token of masked patches: only pretraining masks; see ``Family``."""
        if "architecture" in model_config:
            return ()
        cls = from_transformers(model_config, _ENDING, self.model_type)
        return (f"{cls.base_model_prefix}.embeddings.mask_token",)

    def without_decay(self, model_config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what timm's model exempts; see ``Family.without_decay``."""
        return tuple(model_config.get(_SPARED, ()))

    def fresh_weights(self, model_config: Mapping[str, Any]) -> Mapping[str, float]:
        """Return the head of another number of classes; see ``HasFreshWeights``."""
        if self.classes is None or self.classes == _classes(model_config):
            return {}
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            stored = dict(_build(model_config, None).named_parameters())
            wanted = dict(_build(model_config, self.classes).named_parameters())
        # By shape, because only the models' own code knows what their heads are called.
        return {name: 0.0 for name, p in wanted.items() if p.shape != stored[name].shape}

    def objective(self, settings: Mapping[str, Any], model_folder: Path) -> Objective:
        """Make the objective; the images' mean and deviation are the checkpoint's."""
        mean, deviation = _normalisation(model_folder)
        return Classification(predict=partial(_predict, mean, deviation), **settings)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack the images and their labels; see ``Family.collate``."""
        return {key: torch.stack([one[key] for one in samples]) for key in (PIXELS, LABEL)}

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Count the patches of an image; see ``Family.tokens``."""
        height, width = sample[PIXELS].shape[-2:]
        patch = _pair(model_config.get(_PATCH, 16))
        return int(height // patch[0]) * int(width // patch[1])

    def example(self, model_config: Mapping[str, Any], sizes: Mapping[str, int]) -> Sample:
        """Return an image on the meta device; see ``HasExample``."""
        pixels = torch.empty(3, sizes["H"], sizes["W"], device="meta")
        return {PIXELS: pixels, LABEL: torch.empty((), dtype=torch.int64, device="meta")}

    def fit_data(self, model_config: Mapping[str, Any], data: Any) -> None:
        """Give images the model's size, and refuse another number of classes; see ``FitsData``."""
        names, head = getattr(data, "classes", None), _classes(model_config)
        if names is None or getattr(data, "has_boxes", False):
            raise ConfigError("Invalid data.kind: model_type='vit' is trained on 'classes'.")
        if len(names) != head:
            raise ConfigError(
                f"Invalid data.folder: it holds {len(names)} classes, and the model's head has"
                f" {head}. Set objective.classes={len(names)} for a new head, or another folder."
            )
        data.give_size(*_size(model_config))

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse images of another size than the model's; see ``Family.check_sample``."""
        height, width = _size(model_config)
        step = "remove data.size, or set it to the model's"
        check_shape(sample, PIXELS, (3, height, width), label, step)

    def write_beside(self, model_config: Mapping[str, Any], folder: Path, result: Path) -> None:
        """Write the config of the new head, too, where there is one; see ``HasFiles``."""
        Plain.write_beside(self, model_config, folder, result)
        stored = read_json(folder / "config.json")
        if self.classes is None or self.classes == _classes(stored):
            return
        if "architecture" in stored:
            told = _with_classes(stored, self.classes)
        else:
            told = {**stored, **{key: model_config[key] for key in ("id2label", "label2id")}}
        (result / "config.json").write_bytes(as_json(told))


def _build(model_config: Mapping[str, Any], classes: int | None) -> nn.Module:
    if "architecture" in model_config:
        config = _with_classes(model_config, classes or _classes(model_config))
        model: Any = _timm().create_model(
            config["architecture"], pretrained_cfg=config["pretrained_cfg"], **config["model_args"]
        )
        # Where others look for a config; a plain mapping, so that no library takes it for its own.
        spared = model.no_weight_decay() if hasattr(model, _SPARED) else ()
        patch = getattr(getattr(model, "patch_embed", None), _PATCH, 16)
        model.config = {**config, _SPARED: sorted(spared), _PATCH: patch}
        return model  # type: ignore[no-any-return]
    cls = from_transformers(model_config, _ENDING, ViT.model_type)
    wanted = config_of(cls, model_config)
    if classes is not None and classes != wanted.num_labels:
        wanted.num_labels = classes
    built: nn.Module = cls(wanted)
    return built


def _predict(
    mean: Sequence[float], deviation: Sequence[float], model: nn.Module, batch: Batch
) -> Tensor:
    """Return the logits of a batch."""
    pixels = batch[PIXELS]
    shift, scale = (pixels.new_tensor(one).view(3, 1, 1) for one in (mean, deviation))
    said = model((pixels - shift) / scale)
    return said if isinstance(said, Tensor) else said.logits


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the channels, of images in [0, 1]."""
    for name, keys in ((_PREPROCESSOR, ("image_mean", "image_std")), ("config.json", ("", ""))):
        if not (folder / name).is_file():
            continue
        content = read_json(folder / name)
        if name == _PREPROCESSOR:
            return content.get(keys[0], _HALVES), content.get(keys[1], _HALVES)
        known = content.get("pretrained_cfg") or {}
        return known.get("mean", _HALVES), known.get("std", _HALVES)
    return _HALVES, _HALVES


def _classes(model_config: Mapping[str, Any]) -> int:
    """Classes of a head, by its stored or its live config."""
    if "architecture" in model_config:
        known = model_config.get("pretrained_cfg") or {}
        return int(model_config.get("num_classes", known.get("num_classes", 1000)))
    labels = model_config.get("id2label")
    # transformers' default, which a stored config leaves out.
    return len(labels) if labels else int(model_config.get("num_labels", 2))


def _with_classes(model_config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """Return a config of timm with another number of classes, which it says three times."""
    found = {**model_config, "num_classes": classes}
    for key in ("pretrained_cfg", "model_args"):
        found[key] = {**(model_config.get(key) or {}), "num_classes": classes}
    return found


def _size(model_config: Mapping[str, Any]) -> tuple[int, int]:
    known = model_config.get("pretrained_cfg") or {}
    given = (model_config.get("model_args") or {}).get("img_size")
    found = given or known.get("input_size", (3, 224, 224))[1:]
    return _pair(found if "architecture" in model_config else model_config["image_size"])


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(
            "model_type='vit' needs timm for a folder whose config.json names an 'architecture'."
            ' Run: pip install -e ".[families]"'
        ) from None
    return timm
