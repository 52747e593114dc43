"""Small models to stream: a toy with every kind of block call, and real diffusers classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.toys import Block, Toy

BLOCKS = 6
MIN_NUMEL = 100
"""Streams the toys' weight matrices; biases, norms and rank-2 adapters are smaller."""


def toy_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {"x": torch.randn(4, 7, generator=generator)}


def toy(block: type[Block] = Block, reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Toy(BLOCKS, block, reentrant)


def wan(reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
    )
    return _checkpointed(model, reentrant)


def wan_batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500 + step]),
        "encoder_hidden_states": torch.randn(1, 6, 16, generator=generator),
        "return_dict": False,
    }


def ltx(reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=4,
        caption_channels=12,
    )
    return _checkpointed(model, reentrant)


def ltx_batch(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "hidden_states": torch.randn(1, 8, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 12, generator=generator),
        "timestep": torch.full((1, 8), 500 + step),
        "encoder_attention_mask": torch.ones(1, 5),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "return_dict": False,
    }


def _checkpointed(model: Any, reentrant: bool | None) -> nn.Module:
    if reentrant is not None:

        def run(block: nn.Module, *args: Any) -> Any:
            return checkpoint(block, *args, use_reentrant=reentrant)

        model.enable_gradient_checkpointing(run)
    return model


def add_lora(model: nn.Module, *targets: str) -> nn.Module:
    """Freeze the model and inject rank-2 adapters by PEFT, B not zero so that A moves too."""
    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights=False), model
    )
    return model


@dataclass(frozen=True)
class Family:
    """How to make one model and its batches."""

    make: Callable[..., nn.Module]
    batch: Callable[[int], dict[str, Any]]
    targets: tuple[str, ...]


FAMILIES = {
    "toy": Family(toy, toy_batch, ("to_q", "mlp.0")),
    "wan": Family(wan, wan_batch, ("to_q", "to_k", "ffn.net.2")),
    "ltx": Family(ltx, ltx_batch, ("to_q", "to_k", "ff.net.2")),
}
