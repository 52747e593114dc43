"""A toy's names and shapes for plans made without torch."""

from __future__ import annotations

from dist_layerlr.plan.entries import Plan

RATES = {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5}
PARTS = {
    "attn1.to_q.weight": (8, 8),
    "attn2.to_q.weight": (8, 8),
    "ffn.net.2.weight": (8, 8),
    "norm1.weight": (8,),
}


def config(**block) -> dict:
    return {
        "model_type": "toy",
        "per_layer_lr": {"enabled": True, "component_lr": RATES, "default_lr": 1e-4, **block},
    }


def toy(blocks: int = 3, stack: str = "blocks") -> dict[str, tuple[int, ...]]:
    """A transformer with an embedding and a head outside its blocks."""
    names = {f"{stack}.{i}.{part}": shape for i in range(blocks) for part, shape in PARTS.items()}
    return {"x_embedder.weight": (8, 4), **names, "proj_out.weight": (4, 8)}


def lrs(plan: Plan) -> dict[str, float]:
    return {name: e.lr for name, e in plan.entries.items()}
