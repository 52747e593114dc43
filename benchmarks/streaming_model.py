"""The model of benchmarks/streaming.py: blocks of Wan's shape under LoRA.

On the CPU its compute is held to a speed.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    flops: float | None = None
    """Operations per second that compute is held to, on few rows; None: as fast as it goes."""


WAN_14B = Size(blocks=40, width=5120, ffn=13824, heads=40, text=512, rank=32, dtype=torch.bfloat16)
"""0.35e9 parameters a block, 28 GB."""
SMALL = Size(
    blocks=16, width=256, ffn=1024, heads=4, text=16, rank=4, dtype=torch.float32, flops=12e9
)
"""For the CPU: 1.05e6 parameters a block, at a tenth of what a core does, so that other load does
not matter."""
ROWS = 16
"""Real tokens of a step that is held to a speed."""


class Clock:
    """Makes stretches of work take a set time; one that ended late shortens the next."""

    def __init__(self) -> None:
        self.seconds = self._start = 0.0
        self.settle()

    def settle(self) -> None:
        """Forget how late the last one was."""
        self._late = 0.0

    def open(self) -> None:
        """A stretch begins."""
        self._start = time.perf_counter() - self._late

    def close(self) -> None:
        """It ends, now or later."""
        end = self._start + self.seconds
        time.sleep(max(0.0, end - time.perf_counter()))
        self._late = time.perf_counter() - end


class _Tick(torch.autograd.Function):
    """Identity that opens or closes a stretch in forward, and does the opposite in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, opens: bool) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        ctx.clock, ctx.opens = clock, opens
        # Checkpointing stops to recompute at the last tensor that backward saved: without this one
        # it would stop in front of the closing tick.
        ctx.save_for_backward(x)
        clock.open() if opens else clock.close()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """(B, T, d) -> (B, T, d)."""
        assert ctx.saved_tensors
        ctx.clock.close() if ctx.opens else ctx.clock.open()
        return grad, None, None


def tick(x: Tensor, clock: Clock, *, opens: bool) -> Tensor:
    """Mark where a stretch of work opens or closes: (B, T, d) -> (B, T, d)."""
    marked: Tensor = _Tick.apply(x, clock, opens)  # type: ignore[no-untyped-call]
    return marked


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
        update: Tensor = self.lora_B(self.lora_A(x))
        return base + update


class Block(nn.Module):
    """Self attention, cross attention, feed-forward, pre-norm, as in Wan."""

    def __init__(self, size: Size, device: torch.device | str, clock: Clock):
        super().__init__()
        self.heads = size.heads
        d = size.width
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(d, elementwise_affine=False) for _ in range(3)
        )
        self.attn1 = nn.ModuleDict(
            {n: Adapted(d, d, size, device) for n in ("to_q", "to_k", "to_v", "to_out")}
        )
        self.attn2 = nn.ModuleDict(
            {n: Adapted(d, d, size, device) for n in ("to_q", "to_k", "to_v", "to_out")}
        )
        self.size, self.clock = size, clock
        self.ffn_in, self.ffn_out = (
            Adapted(d, size.ffn, size, device),
            Adapted(size.ffn, d, size, device),
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, T, d), (B, L, d) -> (B, T, d)."""
        if self.size.flops is not None:
            x = tick(x, self.clock, opens=True)
        h = self.norm1(x)
        x = x + self._attend(self.attn1, h, h)
        x = x + self._attend(self.attn2, self.norm2(x), text)
        out: Tensor = self.ffn_out(
            nn.functional.gelu(self.ffn_in(self.norm3(x)), approximate="tanh")
        )
        if self.size.flops is not None:
            out = tick(out, self.clock, opens=False)
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
    """Blocks under checkpointing."""

    def __init__(self, size: Size, device: torch.device | str):
        super().__init__()
        self.reentrant = False
        self.clock = Clock()
        self.blocks = nn.ModuleList(Block(size, device, self.clock) for _ in range(size.blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, T, d), (B, L, d) -> (B, T, d)."""
        self.clock.settle()
        for block in self.blocks:
            x = checkpoint(block, x, text, use_reentrant=self.reentrant)
        return x


@torch.no_grad()
def make_model(size: Size, device: torch.device | str) -> Stack:
    """Build the model with the same weights for every arm.

    Blocks differ by a rotation of one random block: 28 GB of random numbers would take minutes.
    """
    model = Stack(size, device)
    generator = torch.Generator().manual_seed(0)
    first = dict(model.blocks[0].named_parameters())
    for name, param in first.items():
        value = torch.randn(param.shape, generator=generator) * (
            0.02 if name.endswith("base.weight") else 0.002
        )
        param.copy_(value)
    for i, block in enumerate(model.blocks):
        for name, param in block.named_parameters():
            if i:
                param.copy_(first[name].roll(i, 0))
    return model
