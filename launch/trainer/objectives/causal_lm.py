"""Next-token prediction, for language models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from launch.trainer.data.base import Batch

LABELS = "labels"
"""Field of a batch: (B, L) token ids, IGNORED where nothing is to be predicted."""
IGNORED = -100
"""The id that transformers and ``cross_entropy`` leave out of the loss."""
Logits = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> (B, L, vocabulary)."""


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """Predicts every token from those before it. Satisfies ``Objective``."""

    logits: Logits
    """The family's call."""

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean over sequences of their mean cross entropy, in float32.

        It equals the loss of transformers' models where all sequences have equally many targets.
        Elsewhere theirs weighs long sequences more, so that it changes with the microbatches.
        """
        # The logits at position i predict the token at i + 1.
        wanted = batch[LABELS][:, 1:]
        found = self.logits(model, batch)[:, :-1].float().transpose(1, 2)  # (B, V, L - 1)
        each = cross_entropy(found, wanted, ignore_index=IGNORED, reduction="none")  # (B, L - 1)
        # At least 1: a sequence without targets costs 0 and not 0 / 0.
        targets = (wanted != IGNORED).sum(1).clamp(min=1)
        mean: Tensor = (each.sum(1) / targets).mean()
        return mean

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Return None: text is not drawn."""
        return None
