"""Detection: boxes and their classes, by the criterion of the model's own package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.data.base import Batch

TARGETS = "targets"
"""Field of a batch: a list with a mapping per image, ``labels`` (n,), ``boxes`` (n, 4) and more."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """The weighted sum of a criterion's losses. Satisfies ``Objective``."""

    predict: Callable[[nn.Module, Batch], Mapping[str, Any]]
    """(model, batch) -> what the criterion takes."""
    criterion: Any
    """(predictions, targets) -> losses by name; ``weight_dict`` has the weights."""
    counts_over_ranks: ClassVar[bool] = True
    """The criterion divides by the boxes of all ranks."""
    classes: int | None = setting(
        fields.integer(1),
        default=None,
        shown="the checkpoint's",
        doc="How many there are. Another number than the checkpoint's begins with a new head.",
    )

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the loss of a batch, divided by the number of boxes of the batch.

        The criterion counts boxes over all ranks, so that ranks change nothing. Microbatches do:
        each is divided by its own number of boxes, as the package itself does.
        """
        losses = self.criterion(self.predict(model, batch), batch[TARGETS])
        weights: Mapping[str, float] = self.criterion.weight_dict
        parts = [losses[name] * weights[name] for name in losses if name in weights]
        return torch.stack(parts).sum()

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Return None: boxes are not drawn."""
        return None
