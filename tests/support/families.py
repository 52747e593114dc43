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

WIDTH, HIDDEN, BLOCKS = 12, 20, 6
MIN_NUMEL = 100
"""Streams the toys' weight matrices; biases, norms and rank-2 adapters are smaller."""


@dataclass
class State:
    """What the dataclass blocks pass on."""

    x: Tensor


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(torch.tanh(self.to_q(x)) * torch.sigmoid(self.to_k(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class KeywordBlock(Block):
    def forward(self, *, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states)


class DataclassBlock(Block):
    def forward(self, state: State) -> State:  # type: ignore[override]
        return State(super().forward(state.x))


class InnerCheckpointBlock(Block):
    """Checkpoints a part of itself, so that recomputation does not call the block."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Toy(nn.Module):
    """Six blocks; ``reentrant`` None: no checkpointing."""

    def __init__(self, block: type[Block] = Block, reentrant: bool | None = None):
        super().__init__()
        self.emb = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = self.call(block, x)
        return self.head(x)

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            if isinstance(block, KeywordBlock):
                return block(hidden_states=x)
            return block(State(x)).x if isinstance(block, DataclassBlock) else block(x)

        return (
            run(x) if self.reentrant is None else checkpoint(run, x, use_reentrant=self.reentrant)
        )


def toy_batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return {"x": torch.randn(4, 7, generator=generator)}


def toy(block: type[Block] = Block, reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    return Toy(block, reentrant)


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
