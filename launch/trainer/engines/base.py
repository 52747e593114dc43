"""What the loop needs from a way of training: forward, backward, step, gather, prove."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dist_layerlr.checkpoint.load import Restored
from dist_layerlr.checkpoint.save import Saving
from dist_layerlr.offload import Prediction
from dist_layerlr.proof.verify import Proof
from launch.trainer.options import RunOptions, TrainOptions


class Engine(Protocol):
    """A model and its optimizer under one sharder. Gradients are means over ranks."""

    model: nn.Module
    """What is called in the forward pass."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward.

        Only the last of a step needs to synchronise gradients.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss``, already divided by the number of micro steps."""
        ...

    def step(self, factor: float, *, observed: dict[str, float] | None = None) -> float:
        """Step at plan x ``factor`` and clear gradients.

        Returns the global gradient norm before clipping.

        With ``observed``, the rate at which the step really moved each parameter is checked and
        filled in.
        """
        ...

    def prove(self, factor: float) -> Proof:
        """Verify the live learning rates on all ranks."""
        ...

    def predict(self, tokens: int, micro_steps: int, options: RunOptions) -> Prediction | None:
        """Cost of a step of microbatches of ``tokens`` while streaming.

        None where nothing is streamed.
        """
        ...

    def traffic(self) -> dict[str, int]:
        """Bytes and copies since the last call, for the metrics.

        Empty where nothing is streamed.
        """
        ...

    def save(self, root: Path, step: int, extra: Mapping[str, Any], train: TrainOptions) -> Saving:
        """Write a checkpoint of ``step`` done steps; collective."""
        ...

    def load(self, path: Path) -> Restored:
        """Continue from a checkpoint of any sharder and number of ranks; collective."""
        ...
