"""What was measured of the depth strategies, presets and fields that a config chooses."""

from __future__ import annotations

from collections.abc import Mapping

from dist_layerlr.plan.config import Config
from dist_layerlr.plan.entries import Plan

PAGE = "docs/evidence.md"
MEASURED: Mapping[str, str] = {
    # Measured: written by benchmarks/does_it_help.py --report.
    "layer_decay": (
        "a pretrained ViT, 5 labels per class (10 seeds): accuracy no difference to flat "
        "(layer_decay 0.9, layer_decay 0.75, layer_decay 0.65, layer_decay 0.5), no "
        "difference to scratch (scratch, layer_decay 0.65); forgetting better than flat "
        "(layer_decay 0.9, layer_decay 0.75, layer_decay 0.65, layer_decay 0.5)"
    ),
    "component_lr": (
        "a small Llama from scratch (4 seeds): loss no difference to uniform (paper, "
        "reverse), better than reverse (paper)"
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
