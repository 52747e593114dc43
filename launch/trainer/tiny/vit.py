"""Tiny classifiers: a ViT and a Swin of timm, a ViT and a DINOv2 of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from launch.trainer.tiny.folders import ModelFolder, save_all

CLASSES, SIDE, PATCH = 5, 16, 4
"""Of the head; pixels of an image and of a patch, each way."""
_VIT = {"patch_size": PATCH, "embed_dim": 24, "depth": 3, "num_heads": 2}
_SWIN = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (1, 2),
    "num_heads": (2, 2),
    "window_size": 4,
}
_HF = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _timm(name: str, sizes: Mapping[str, Any]) -> ModelFolder:
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=SIDE, num_classes=CLASSES, **sizes)
    return ModelFolder(components={"model": model}, save=_save_timm)


def _save_timm(components: Mapping[str, Any], folder: Path) -> None:
    from timm.models import save_for_hf

    # Which paths are dropped depends on the microbatch, so that ranks would change the run; timm
    # does not write down by itself that none are.
    save_for_hf(
        components["model"],
        str(folder),
        model_args={"drop_path_rate": 0.0},
        safe_serialization=True,
    )


def _transformers(name: str) -> ModelFolder:
    import transformers

    config = getattr(transformers, f"{name}Config")(**_HF, num_labels=CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForImageClassification")(config)
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.ViTImageProcessor(
        size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    return ModelFolder(components={"model": model, "processor": processor}, save=save_all)


FOLDERS: dict[str, Callable[[], ModelFolder]] = {
    "vit": lambda: _timm("vit_tiny_patch16_224", _VIT),
    "vit_swin": lambda: _timm("swin_tiny_patch4_window7_224", _SWIN),
    "vit_transformers": lambda: _transformers("ViT"),
    "vit_dinov2": lambda: _transformers("Dinov2"),
}
