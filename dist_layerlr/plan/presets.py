"""Named blocks of settings: ``"preset": "style_lora"``.

Any field beside the preset overrides it, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_layerlr import fields
from dist_layerlr.fields import setting
from dist_layerlr.plan.layer_decay import CONVENTIONS

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RfdetrPreset:
    """RF-DETR's three regions: ViT encoder with layer decay, decoder, and the rest at lr."""

    lr_encoder: float = setting(
        fields.number(0.0), default=1.5e-4, doc="Rate of the encoder before decay."
    )
    lr_vit_layer_decay: float = setting(
        fields.number(0.0, 1.0, open_low=True), default=0.8, doc="Rate per encoder layer."
    )
    lr_component_decay: float = setting(
        fields.number(0.0, 1.0, open_low=True), default=0.7, doc="Multiplier of the decoder."
    )
    convention: str = setting(
        fields.one_of(lambda: tuple(CONVENTIONS)),
        default="seed",
        doc="`rfdetr`, as the live library has it: the encoder is multiplied by lr_component_decay"
        " squared.",
    )
    out_feature_indexes: list[int] | None = setting(
        fields.integers(at_least=1),
        default=None,
        shown="the live model's; by names alone L is the block count",
        doc="L is the last one plus 1; only `rfdetr` reads it off the model.",
    )

    def block(self, learning_rate: float | None) -> Block:
        """The ``per_layer_lr`` block; whatever is no encoder or decoder trains at lr, or 1e-4."""
        lr = 1e-4 if learning_rate is None else learning_rate
        shared = self.lr_component_decay**2 if self.convention == "rfdetr" else 1.0
        encoder: Block = {
            # Projectors stand below `backbone` too, and train as the rest does. The encoder is
            # `backbone.0.encoder` in the library, `backbone.backbone` in transformers.
            "match": r"re:(^|\.)backbone\.((\d+\.)?encoder|backbone)\.",
            "lr": self.lr_encoder * shared,
            "depth_strategy": "layer_decay",
            "layer_decay": self.lr_vit_layer_decay,
            "convention": self.convention,
            # The library's own list of what has no weight decay.
            "no_decay": ["re:gamma|pos_embed|rel_pos|bias|norm|embeddings"],
        }
        if self.out_feature_indexes:
            encoder["num_layers"] = self.out_feature_indexes[-1] + 1
        decoder = {
            # `transformer` in the library, `model` in transformers.
            "match": r"re:(^|\.)(transformer|model)\.decoder\.",
            "lr": lr * self.lr_component_decay,
        }
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
PRESET_CLASSES: Mapping[str, type[RfdetrPreset]] = {"rfdetr": RfdetrPreset}
"""Presets with settings of their own; these keys are allowed beside that preset only."""
