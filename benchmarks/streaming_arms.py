"""The model of benchmarks/streaming.py, and one builder for every way to train it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_layerlr.offload import StreamPolicy, stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A stack of video transformer blocks."""

    blocks: int
    width: int
    ffn: int
    heads: int
    text: int
    """Tokens that cross attention looks at."""
    rank: int
    """Of the LoRA on every linear layer."""
    dtype: torch.dtype


WAN_14B = Size(blocks=40, width=5120, ffn=13824, heads=40, text=512, rank=32, dtype=torch.bfloat16)
"""0.35e9 parameters a block, 28 GB."""
SMALL = Size(blocks=12, width=256, ffn=1024, heads=4, text=16, rank=4, dtype=torch.float32)
"""For two CPU cores: 1.05e6 parameters a block."""


class Adapted(nn.Module):
    """A frozen linear layer and its LoRA, without a dependency on PEFT."""

    def __init__(self, inputs: int, outputs: int, size: Size, device: torch.device | str):
        super().__init__()
        kwargs: dict[str, Any] = {"bias": False, "dtype": size.dtype, "device": device}
        self.base = nn.Linear(inputs, outputs, **kwargs).requires_grad_(False)
        self.lora_A = nn.Linear(inputs, size.rank, **kwargs)
        self.lora_B = nn.Linear(size.rank, outputs, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, outputs)."""
        base: Tensor = self.base(x)
        return base + self.lora_B(self.lora_A(x))


class Block(nn.Module):
    """Self attention, cross attention, feed-forward, pre-norm, as in Wan."""

    def __init__(self, size: Size, device: torch.device | str):
        super().__init__()
        self.heads = size.heads
        d = size.width
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d, elementwise_affine=False) for _ in range(3))
        self.attn1 = nn.ModuleDict({n: Adapted(d, d, size, device) for n in ("to_q", "to_k", "to_v", "to_out")})
        self.attn2 = nn.ModuleDict({n: Adapted(d, d, size, device) for n in ("to_q", "to_k", "to_v", "to_out")})
        self.ffn_in, self.ffn_out = Adapted(d, size.ffn, size, device), Adapted(size.ffn, d, size, device)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, T, d), (B, L, d) -> (B, T, d)."""
        h = self.norm1(x)
        x = x + self._attend(self.attn1, h, h)
        x = x + self._attend(self.attn2, self.norm2(x), text)
        out: Tensor = self.ffn_out(nn.functional.gelu(self.ffn_in(self.norm3(x)), approximate="tanh"))
        return x + out

    def _attend(self, attention: nn.ModuleDict, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (
            attention[n](t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n, t in (("to_q", x), ("to_k", other), ("to_v", other))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = attention["to_out"](y.transpose(1, 2).flatten(2))
        return out


class Stack(nn.Module):
    """Blocks under non-reentrant checkpointing."""

    def __init__(self, size: Size, device: torch.device | str):
        super().__init__()
        self.blocks = nn.ModuleList(Block(size, device) for _ in range(size.blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, T, d), (B, L, d) -> (B, T, d)."""
        for block in self.blocks:
            x = checkpoint(block, x, text, use_reentrant=False)
        return x


@torch.no_grad()
def make_model(size: Size, device: torch.device | str) -> Stack:
    """The same weights for every arm: blocks differ by a rotation of one random block, which takes seconds at 28 GB."""
    model = Stack(size, device)
    generator = torch.Generator().manual_seed(0)
    first = dict(model.blocks[0].named_parameters())
    for name, param in first.items():
        value = torch.randn(param.shape, generator=generator) * (0.02 if name.endswith("base.weight") else 0.002)
        param.copy_(value)
    for i, block in enumerate(model.blocks):
        for name, param in block.named_parameters():
            if i:
                param.copy_(first[name].roll(i, 0))
    return model


@dataclasses.dataclass(kw_only=True)
class Arm:
    """One way to train, ready to step."""

    label: str
    parameters: list[nn.Parameter]
    """What the optimizer steps."""
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x, text, target) -> loss, gradients accumulated."""
    handle: Any = None
    """Ours."""
    window: int = 2
    resident: int = 0
    overlaps: bool = True
    """Whether ``predict`` speaks of it."""
    close: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, x: Tensor, text: Tensor, target: Tensor) -> float:
        """One training step. Returns the loss."""
        loss = self.backward(x, text, target)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def stop(self) -> None:
        """Free everything."""
        self.close()
        self.parameters, self.optimizer, self.handle, self.backward = [], None, None, None  # type: ignore[assignment]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _plain(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def backward(x: Tensor, text: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(model(x, text).float(), target.float())
        torch.autograd.backward(loss)
        return loss.detach()

    return backward


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def resident(size: Size, device: torch.device) -> Arm:
    """Everything on the device."""
    model = make_model(size, device)
    return Arm(label="resident", parameters=_trainable(model), backward=_plain(model))
