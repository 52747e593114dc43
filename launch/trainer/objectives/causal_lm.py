"""Next-token prediction, for language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.data.base import Batch

LABELS = "labels"
"""Field of a batch: (B, L) token ids, IGNORED where nothing is to be predicted."""
TOKENS = "tokens"
"""Field of a batch: (B, L) bool, False at padding, which no router has to balance."""
IGNORED = -100
"""The id that transformers and ``cross_entropy`` leave out of the loss."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the routers of a mixture of experts said of a batch."""

    logits: tuple[Tensor, ...]
    """Of each layer, (B * L, experts)."""
    chosen: int
    """Experts that a token is sent to."""
    weight: float
    """Of the auxiliary loss in the loss, as the checkpoint's config has it."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What a language model says of a batch."""

    logits: Tensor
    """(B, L, vocabulary)."""
    routing: Routing | None = None
    """None: a model without routers."""


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Predicts every token from those before it. Satisfies ``Objective``."""

    predict: Callable[[nn.Module, Batch], Predicted]
    """The family's call."""
    router_weight: float | None = setting(
        fields.number(0.0),
        default=None,
        shown="the checkpoint's",
        doc="Of the routers' load balancing loss, for a mixture of experts.",
    )

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean over sequences of their mean cross entropy, in float32.

        It equals the loss of transformers' models where all sequences have equally many targets.
        Elsewhere theirs weighs long sequences more, so that it changes with the microbatches. The
        loss of the routers is a mean over sequences for the same reason: theirs balances experts
        over whatever shares a microbatch, and equals this one where that is one sequence.
        """
        said = self.predict(model, batch)
        # The logits at position i predict the token at i + 1.
        wanted = batch[LABELS][:, 1:]
        found = said.logits[:, :-1].float().transpose(1, 2)  # (B, V, L - 1)
        each = cross_entropy(found, wanted, ignore_index=IGNORED, reduction="none")  # (B, L - 1)
        # At least 1: a sequence without targets costs 0 and not 0 / 0.
        targets = (wanted != IGNORED).sum(1).clamp(min=1)
        mean: Tensor = (each.sum(1) / targets).mean()
        if said.routing is None:
            return mean
        weight = said.routing.weight if self.router_weight is None else self.router_weight
        return mean + weight * unbalanced(said.routing, batch[TOKENS])

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Return None: text is not drawn."""
        return None


def unbalanced(routing: Routing, tokens: Tensor) -> Tensor:
    """Return the mean over sequences of the Switch Transformer's load balancing loss.

    Args:
        routing: Of the batch.
        tokens: (B, L) bool, False at padding.
    """
    # (layers, B, L, experts): a sequence is balanced over all layers at once, as transformers does.
    logits = torch.stack([one.float() for one in routing.logits])
    logits = logits.view(len(logits), *tokens.shape, -1)
    shares = logits.softmax(-1)
    experts = shares.shape[-1]
    sent = one_hot(shares.topk(routing.chosen).indices, experts).sum(-2).float()
    real = tokens[None, :, :, None].float()
    rows = (len(logits) * tokens.sum(1)).clamp(min=1)[:, None]
    load, share = ((one * real).sum((0, 2)) / rows for one in (sent, shares))
    return experts * (load * share).sum(-1).mean()
