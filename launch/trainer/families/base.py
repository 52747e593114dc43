"""What the training loop needs to know about a model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Family(Protocol):
    """One model architecture: its class, how to call it, what data fits it.

    To add a family, write one file with a class like this and one line in ``families/__init__.py``.
    """

    @property
    def model_type(self) -> str:
        """The value of ``model_type`` in the config."""
        ...

    @property
    def model_class(self) -> type[nn.Module]:
        """The diffusers class. Imported on first use: diffusers takes seconds to load."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Module name endings that LoRA adapts unless the config says otherwise."""
        ...

    @property
    def flat_units(self) -> tuple[str, ...]:
        """Modules whose ``parameters()`` the forward reads: each becomes a flat FSDP1 unit, else it
        would see none.
        """
        ...

    def velocity(
        self, model: nn.Module, noisy: Tensor, timestep: Tensor, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Call the model, however wrapped, and return the velocity (B, C, F, H, W).

        Args:
            model: the model or its DDP, FSDP or DeepSpeed wrapper.
            noisy: (B, C, F, H, W), on the model's device and in its input dtype.
            timestep: (B,) in [0, 1000].
            batch: stacked data samples; ``prompt_embeds`` (B, L, D) like ``noisy`` in device and
                dtype.
        """
        ...

    def tokens(self, model_config: Mapping[str, Any], sample: Mapping[str, Tensor]) -> int:
        """Tokens that the blocks see for one sample."""
        ...

    def check_sample(
        self,
        model_config: Mapping[str, Any],
        sample: Mapping[str, Tensor],
        label: str = "data sample",
    ) -> None:
        """Refuse a data sample that the model cannot take.

        Args:
            model_config: content of the checkpoint's ``config.json``.
            sample: ``latents`` (C, F, H, W) and ``prompt_embeds`` (L, D).
            label: file or sample name for the message.

        Raises:
            ModelSourceError: label, field, shape found and shape needed.
        """
        ...
