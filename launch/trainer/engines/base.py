"""What the loop needs from a way of training: forward, backward, step, prove, save, load."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_layerlr.checkpoint import Restored, Saving
from dist_layerlr.offload import Prediction
from dist_layerlr.plan import Plan
from dist_layerlr.proof import Proof
from launch.trainer.options import RunOptions, TrainOptions


class Engine(Protocol):
    """A model and its optimizer under one sharder. Gradients are means over ranks."""

    model: nn.Module
    """What is called in the forward pass."""
    optimizer: Any
    """What is stepped, as ``verify`` takes it: None where the model brings its own."""

    plan: Plan
    """The learning rates that it steps with now."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one forward and backward.

        Only the last one of a step needs to reduce gradients over ranks.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss``, already divided by the number of micro steps."""
        ...

    def begin(self, factor: float, step: int) -> None:
        """Put the rates of an optimizer step in force, before its backward passes.

        Args:
            factor: The schedule's multiplier.
            step: Counted from 0; a plan with timings looks at it.
        """
        ...

    def step(self, factor: float, *, observed: dict[str, float] | None = None) -> float:
        """Step at plan x ``factor`` and clear gradients.

        Args:
            factor: The schedule's multiplier.
            observed: If given, the rate at which the step really moved each parameter is compared
                with the plan, and filled in.

        Returns:
            The global gradient norm before clipping.

        Raises:
            PlanMismatch: A parameter moved at another rate than planned.
        """
        ...

    def rest(self) -> None:
        """Leave the device while another model trains, where this one is there as a whole."""
        ...

    def wake(self) -> None:
        """Come back to the device."""
        ...

    def steer(self, plan: Plan, factor: float) -> None:
        """Step at the rates of another plan of the same names from now on. Collective.

        Args:
            plan: The one to be in force.
            factor: The schedule's multiplier that the groups are at.

        Raises:
            PlanMismatch: The optimizer cannot take it, on all ranks alike. Nothing has changed.
        """
        ...

    def prove(self, factor: float, steps: int) -> Proof:
        """Verify the live learning rates on all ranks, and values after ``steps`` steps."""
        ...

    def predict(self, tokens: int, micro_steps: int, options: RunOptions) -> Prediction | None:
        """Predict the cost of a step of microbatches of ``tokens`` while streaming.

        None where nothing is streamed.
        """
        ...

    def traffic(self) -> dict[str, int]:
        """Bytes and copies since the last call, for the metrics; empty where nothing streams."""
        ...

    def save(self, root: Path, step: int, extra: Mapping[str, Any], train: TrainOptions) -> Saving:
        """Write a checkpoint of ``step`` done steps. Collective."""
        ...

    def load(self, path: Path) -> Restored:
        """Continue from a checkpoint of any sharder and number of ranks. Collective."""
        ...


def autocast(device: torch.device, options: RunOptions) -> torch.autocast:
    """Return the context of every forward: ``train.dtype``."""
    # While streaming no cast is cached: autocast would keep a bf16 copy of every block on the
    # device until the end of the forward pass.
    return torch.autocast(
        device.type,
        dtype=torch.bfloat16,
        enabled=options.train.dtype == "bf16",
        cache_enabled=options.stream is None,
    )
