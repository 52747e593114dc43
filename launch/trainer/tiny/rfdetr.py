"""A tiny RF-DETR: the package's Nano with a narrow encoder of four layers and few queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from launch.trainer.families.plain import as_json
from launch.trainer.families.rfdetr import BACKBONE, NAME, backbone_of
from launch.trainer.tiny.folders import ModelFolder

CLASSES = 3
CONFIG: dict[str, Any] = {
    NAME: "RFDETRNano",
    BACKBONE: {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 4},
    "num_classes": CLASSES,
    "out_feature_indexes": [2, 4],
    "hidden_dim": 64,
    "sa_nheads": 2,
    "ca_nheads": 4,
    "num_queries": 13,
    "num_select": 13,
    "group_detr": 2,
    "resolution": 64,
    "positional_encoding_size": 4,
}


def rfdetr() -> ModelFolder:
    """Make the detector, weights from a seed of their own."""
    import rfdetr.config
    from rfdetr.models.lwdetr import build_model_from_config

    given = {key: value for key, value in CONFIG.items() if key not in (NAME, BACKBONE)}
    settings = rfdetr.config.RFDETRNanoConfig(**given, pretrain_weights="none.pth", device="cpu")
    train = rfdetr.config.TrainConfig(dataset_dir=".", output_dir=".")
    with torch.random.fork_rng(devices=[]), backbone_of(CONFIG[BACKBONE]):
        torch.manual_seed(0)
        model = build_model_from_config(settings, train)
        # As new they are 0: two queries alike would be matched by chance, and boxes never move.
        for parameter in (model.refpoint_embed.weight, *model.bbox_embed.layers[-1].parameters()):
            torch.nn.init.normal_(parameter, std=0.1)
    return ModelFolder(components={"model": model}, save=_save)


def _save(components: Mapping[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in components["model"].state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"))
    (folder / "config.json").write_bytes(as_json(CONFIG))


FOLDERS: dict[str, Callable[[], ModelFolder]] = {"rfdetr": rfdetr}
