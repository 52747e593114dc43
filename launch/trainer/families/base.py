"""What the training loop needs to know about a model family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from launch.trainer.data.base import Batch, Sample
from launch.trainer.objectives import Objective


class Family(Protocol):
    """One model architecture: how it is built and called, and what data fits it.

    To add a family, write one file with a class like this and one line in ``families/__init__.py``.
    """

    @property
    def model_type(self) -> str:
        """The value of ``model_type`` in the config."""
        ...

    @property
    def model_class(self) -> type[nn.Module]:
        """The diffusers or transformers class.

        Import it on first use: these libraries take seconds to load.
        """
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Module name endings that LoRA adapts unless the config says otherwise."""
        ...

    @property
    def flat_units(self) -> tuple[str, ...]:
        """Submodules whose forward iterates ``self.parameters()``, to find a dtype for example.

        With flat FSDP1 that iterator is empty unless the submodule is a unit of its own, so each
        of these is wrapped separately.
        """
        ...

    @property
    def objective(self) -> Objective:
        """What its models are trained for; it holds the family's own call of the model."""
        ...

    def build(self, model_config: Mapping[str, Any]) -> nn.Module:
        """Build the model that a checkpoint's ``config.json`` describes, its weights unset.

        The caller sees to it that parameters are created on the meta device.
        """
        ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Make a batch of samples: ``data.base.stack`` where all have the same shapes.

        A family whose samples differ in shape pads them, packs them, or returns lists.
        """
        ...

    def tokens(self, model_config: Mapping[str, Any], sample: Sample) -> int:
        """Tokens that the blocks see for one sample."""
        ...

    def check_sample(
        self, model_config: Mapping[str, Any], sample: Sample, label: str = "data sample"
    ) -> None:
        """Refuse a data sample that the model cannot take.

        Args:
            model_config: Content of the checkpoint's ``config.json``.
            sample: One item of the dataset; its tensors may be on the meta device.
            label: File or sample name for the message.

        Raises:
            ModelSourceError: label, field, shape found and shape needed.
        """
        ...
