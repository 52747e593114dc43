"""Classification: one class of several, for images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dist_layerlr import fields
from dist_layerlr.fields import setting
from launch.trainer.data.base import Batch

LABEL = "label"
"""Field of a batch: (B,) int64, the number of the class."""


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross entropy of the classes. Satisfies ``Objective``."""

    predict: Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> (B, classes)."""
    classes: int | None = setting(
        fields.integer(1),
        default=None,
        shown="the checkpoint's",
        doc="How many there are. Another number than the checkpoint's begins with a new head.",
    )
    label_smoothing: float = setting(
        fields.number(0.0, 1.0),
        default=0.0,
        doc="Share of the target that is spread over all classes.",
    )

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean cross entropy of the samples, in float32."""
        found = self.predict(model, batch).float()
        return cross_entropy(found, batch[LABEL], label_smoothing=self.label_smoothing)

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Return None: a class is not drawn."""
        return None
