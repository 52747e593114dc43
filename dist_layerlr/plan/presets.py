"""Named blocks of settings: ``"preset": "style_lora"``.

Any field beside the preset overrides it, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Block = dict[str, Any]


def _grid(
    strategy: str,
    floor: float | None,
    self_attn: float,
    cross_attn: float,
    ffn: float,
    **more: float,
) -> Block:
    block: Block = {
        "enabled": True,
        "depth_strategy": strategy,
        "component_lr": {"self_attn": self_attn, "cross_attn": cross_attn, "ffn": ffn},
        **more,
    }
    if floor is not None:
        block["min_depth_factor"] = floor
    return block


def rfdetr(
    *,
    learning_rate: float | None = None,
    lr_encoder: float = 1.5e-4,
    lr_vit_layer_decay: float = 0.8,
    lr_component_decay: float = 0.7,
    convention: str = "seed",
    out_feature_indexes: list[int] | None = None,
) -> Block:
    """RF-DETR's three regions: ViT encoder with layer decay, decoder at ``lr *
    lr_component_decay``, the rest at lr.

    Args:
        learning_rate: lr of heads, projector and queries; 1e-4 when absent.
        lr_encoder: LR of the encoder before decay.
        lr_vit_layer_decay: rate per encoder layer, (0, 1].
        lr_component_decay: multiplier of the decoder, (0, 1].
        convention: `seed`, or `rfdetr` for the live library: the encoder is multiplied by
            lr_component_decay squared.
        out_feature_indexes: the model's; L is the last one plus 1. Absent: L is the block count.
    """
    lr = 1e-4 if learning_rate is None else learning_rate
    encoder: Block = {
        "match": r"re:(^|\.)backbone\.(?!(\d+\.)?projector\.)",
        "lr": lr_encoder * (lr_component_decay**2 if convention == "rfdetr" else 1.0),
        "depth_strategy": "layer_decay",
        "layer_decay": lr_vit_layer_decay,
        "convention": convention,
        "no_decay": ["re:gamma|pos_embed|rel_pos|bias|norm|embeddings"],
    }
    if out_feature_indexes:
        encoder["num_layers"] = out_feature_indexes[-1] + 1
    decoder = {"match": r"re:(^|\.)(transformer|model)\.decoder\.", "lr": lr * lr_component_decay}
    return {
        "enabled": True,
        "component_lr": {},
        "default_lr": lr,
        "depth_strategy": "flat",
        "unmatched": "default",
        "regions": [encoder, decoder],
    }


PRESETS: Mapping[str, Block] = {
    "style_lora": _grid("inverted_u", 0.3, 5e-4, 2e-4, 3e-4, peak_position=0.5),
    "subject_lora": _grid("linear", 0.3, 4e-4, 1e-4, 2.5e-4),
    "concept_lora": _grid("cosine", 0.35, 3e-4, 2.5e-4, 2e-4),
    "full_finetune": _grid("cosine", 0.15, 1.5e-5, 5e-6, 1e-5),
    "component_only": _grid("flat", None, 4e-4, 1e-4, 3e-4),
    "conservative": _grid("linear", 0.7, 4e-4, 3e-4, 3.5e-4),
}
PRESET_FUNCTIONS: Mapping[str, Callable[..., Block]] = {"rfdetr": rfdetr}
"""Presets with parameters of their own; these keys are allowed beside that preset only."""
