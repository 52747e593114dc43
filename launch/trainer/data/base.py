"""What the training loop needs to know about a dataset."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Dataset(Protocol):
    """Samples ready for the model, in a fixed order. Shuffling belongs to the training loop."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return sample ``index`` in [0, len): the same tensors on every call, rank and run.

        Float32 CPU tensors: ``latents`` (C, F, H, W) in about [-1, 1] and ``prompt_embeds`` (L, D).
        """
        ...

    def name(self, index: int) -> str:
        """Return a short label of sample ``index`` for people: its prompt, class or file."""
        ...
