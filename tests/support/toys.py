"""The toy models of the tests: one attention, the blocks around it, and the models made of them.

Real models stand in `tests.support.families`; a model with one odd layer stands beside its test.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HIDDEN = 19, 37
"""Both are odd on purpose: no size divides by two ranks, or by an alignment."""


class Attention(nn.Module):
    """A stand-in under the names of attention, one projection without a bias."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out(torch.tanh(self.to_q(x)) * torch.sigmoid(self.to_k(x)))


class Block(nn.Module):
    """Attention and MLP under their short names, behind one norm."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


@dataclass
class State:
    """What the dataclass blocks pass on."""

    x: Tensor


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
    """An embedding, a stack of blocks and a head; ``reentrant`` None: no checkpointing."""

    def __init__(
        self, blocks: int = 3, block: type[Block] = Block, reentrant: bool | None = None
    ) -> None:
        super().__init__()
        self.emb = nn.Linear(7, WIDTH)
        self.blocks = nn.ModuleList([block() for _ in range(blocks)])
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

        if self.reentrant is None:
            return run(x)
        return checkpoint(run, x, use_reentrant=self.reentrant)


class TwoNormBlock(nn.Module):
    """Attention and MLP under diffusers' names, a norm before each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn1 = Attention()
        self.ffn = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Frozen(nn.Linear):
    """A class of its own, so that FSDP1 can flatten it alone."""


class Transformer(nn.Module):
    """All that sharders trip over: a frozen layer, tied weights, and ``gate``, of which all but
    one rank hold no element.
    """

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.patch = nn.Linear(7, WIDTH)
        self.still = Frozen(WIDTH, WIDTH).requires_grad_(False)
        self.tie_a, self.tie_b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tie_b.weight = self.tie_a.weight
        self.gate = nn.Parameter(torch.full((1,), 0.3))
        self.blocks = nn.ModuleList([TwoNormBlock() for _ in range(blocks)])
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tie_b(torch.tanh(self.tie_a(self.still(self.patch(x)))))
        for block in self.blocks:
            x = block(x)
        return self.last(x * self.gate)
