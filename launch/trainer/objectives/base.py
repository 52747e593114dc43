"""What the training loop needs to know about an objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from launch.trainer.data.base import Batch


class Objective(Protocol):
    """What is predicted, from which noise and timesteps, and what is compared with what.

    A family knows how its model is called; an objective knows what to ask of it. An objective
    therefore takes that call as an argument of its own, as ``FlowMatching(velocity=...)`` does,
    and one objective serves every family whose call has the same form.

    Everything random must derive from the seed and the sample numbers alone, so that a run on
    1 or N ranks, in microbatches of any size, sees the same noise. For the same reason each sample
    should count alike: the loss of a batch is the mean of its samples' losses.
    """

    def loss(self, model: nn.Module, batch: Batch, numbers: Sequence[int], seed: int) -> Tensor:
        """Return the mean loss of a batch, a scalar. Runs in the autocast of ``train.dtype``.

        Args:
            model: The model or its DDP, FSDP or DeepSpeed wrapper. Call it once, and as a whole.
            batch: What the family's ``collate`` returned, on the model's device.
            numbers: The samples' numbers in the run, ``step * global_batch + position``.
            seed: Of the run.
        """
        ...

    def generate(self, model: nn.Module, batch: Batch, seed: int, steps: int) -> Tensor | None:
        """Make one clip (C, F, H, W) or image (C, H, W) for each sample, stacked.

        None where there is nothing to draw. Collective; runs in the autocast of ``train.dtype``.

        Args:
            model: As in ``loss``.
            batch: As in ``loss``; its samples' conditions are used.
            seed: Of the run.
            steps: Calls of the model, 1 or more.
        """
        ...


@runtime_checkable
class FitsPipeline(Protocol):
    """An objective whose settings decide how the model must be sampled."""

    def fit_pipeline(self, pipeline: Any) -> None:
        """Change the scheduler of a pipeline of diffusers to what is trained for."""
        ...


@runtime_checkable
class HasLevels(Protocol):
    """An objective whose samples are trained at random levels of noise."""

    def at_level(self, level: float) -> Objective:
        """Return the same objective with every sample at one level.

        Args:
            level: Place in the range of noise that is trained, 0 (least) to 1 (most).
        """
        ...


@runtime_checkable
class Noted(Protocol):
    """An objective with something to say once, before training."""

    @property
    def note(self) -> str | None:
        """One line for the log."""
        ...
