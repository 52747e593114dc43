"""What was measured of the depth strategies, presets and fields that a config chooses."""

from __future__ import annotations

from collections.abc import Mapping

from dist_layerlr.plan.config import Config
from dist_layerlr.plan.entries import Plan

PAGE = "docs/evidence.md"
MEASURED: Mapping[str, str] = {
    # Measured: written by benchmarks/does_it_help.py --report.
    "linear": (
        "a small Wan, few clips of two new digits (10 seeds): loss no difference to flat, no "
        "difference to reversed linear; forgetting worse than flat, no difference to reversed "
        "linear. a small Wan, a new prompt word (10 seeds): loss no difference to flat, no "
        "difference to reversed linear; leakage no difference to flat, no difference to "
        "reversed linear"
    ),
    "cosine": (
        "a small Wan, few clips of two new digits (10 seeds): loss no difference to flat; "
        "forgetting worse than flat. a small Wan, a new prompt word (10 seeds): loss no "
        "difference to flat; leakage no difference to flat"
    ),
    "inverted_u": (
        "a small Wan, few clips of two new digits (10 seeds): loss no difference to flat "
        "(inverted_u, inverted_u, early, inverted_u, late); forgetting worse than flat "
        "(inverted_u, inverted_u, early, inverted_u, late). a small Wan, a new prompt word "
        "(10 seeds): loss no difference to flat (inverted_u, inverted_u, early, inverted_u, "
        "late); leakage no difference to flat (inverted_u, inverted_u, early, inverted_u, "
        "late)"
    ),
    "layer_decay": (
        "a pretrained ViT, 5 labels per class (20 seeds): accuracy no difference to flat "
        "(layer_decay 0.9, layer_decay 0.75, layer_decay 0.65, layer_decay 0.5), no "
        "difference to scratch (scratch, layer_decay 0.65); forgetting better than flat "
        "(layer_decay 0.9, layer_decay 0.75, layer_decay 0.65, layer_decay 0.5). a small Wan, "
        "few clips of two new digits (10 seeds): loss no difference to flat (layer_decay "
        "0.8); forgetting no difference to flat (layer_decay 0.8). a LoRA of a small Wan, a "
        "new style (10 seeds): loss no difference to flat (layer_decay 0.8). a small Wan, a "
        "new prompt word (10 seeds): loss no difference to flat (layer_decay 0.8); leakage no "
        "difference to flat (layer_decay 0.8)"
    ),
    "table": (
        "a small Wan, few clips of two new digits (10 seeds): loss no difference to flat "
        "(reversed linear); forgetting worse than flat (reversed linear). a LoRA of a small "
        "Wan, a new style (10 seeds): loss no difference to flat (reversed linear). a small "
        "Wan, a new prompt word (10 seeds): loss no difference to flat (reversed linear); "
        "leakage no difference to flat (reversed linear)"
    ),
    "style_lora": "a LoRA of a small Wan, a new style (10 seeds): loss worse than flat",
    "subject_lora": "a LoRA of a small Wan, a new style (10 seeds): loss no difference to flat",
    "concept_lora": "a LoRA of a small Wan, a new style (10 seeds): loss no difference to flat",
    "full_finetune": (
        "a small Wan, few clips of two new digits (10 seeds): loss no difference to flat; "
        "forgetting no difference to flat"
    ),
    "component_only": "a LoRA of a small Wan, a new style (10 seeds): loss no difference to flat",
    "conservative": "a LoRA of a small Wan, a new style (10 seeds): loss no difference to flat",
    "component_lr": (
        "a small Wan, few clips of two new digits (10 seeds): loss no difference to flat "
        "(attention x3, ffn x3); forgetting better than flat (attention x3), worse than flat "
        "(ffn x3). a small Wan, a new prompt word (10 seeds): loss no difference to flat "
        "(attention x3), better than flat (ffn x3), worse than ffn x3 (attention x3); leakage "
        "no difference to flat (attention x3, ffn x3), no difference to ffn x3 (attention "
        "x3). a small Llama from scratch (4 seeds): loss no difference to uniform (paper, "
        "reverse), better than reverse (paper)"
    ),
    "lora_plus_ratio": (
        "a LoRA of a small Wan, a new style (10 seeds): loss no difference to flat (LoRA+ 4, "
        "LoRA+ 16)"
    ),
    "advise": (
        "a pretrained ViT, 5 labels per class (10 seeds): accuracy no difference to flat "
        "(advised, advised from 1.5); forgetting no difference to flat (advised, advised from "
        "1.5). a small Wan, few clips of two new digits (10 seeds): loss no difference to "
        "flat (advised, advised from 1.5); forgetting no difference to flat (advised, advised "
        "from 1.5)"
    ),
    # End.
}
"""Name -> where it was measured, and how it went there."""


def evidence_line(plan: Plan) -> str | None:
    """What is known of a plan's choices, in one line; None: it has one flat rate."""
    names = _choices(plan.config)
    if not names:
        return None
    said = "; ".join(f"{name}: {MEASURED.get(name, 'not measured')}" for name in names)
    return f"evidence ({PAGE}): {said}"


def _choices(config: Config) -> list[str]:
    """Strategies and fields that shape the rates, each once."""
    block = config.per_layer_lr
    if not block.enabled:
        return []
    depths = [block.depth, *(region.depth for region in block.regions if region.depth is not None)]
    # Regions often share a strategy, and `flat` shapes nothing.
    names = dict.fromkeys(depth.depth_strategy for depth in depths)
    names.pop("flat", None)
    if len(set(block.component_lr.values())) > 1:
        names["component_lr"] = None
    if block.lora_plus_ratio != 1.0:
        names["lora_plus_ratio"] = None
    return list(names)
