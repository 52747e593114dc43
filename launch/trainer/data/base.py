"""What the training loop needs to know about a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Sample = Mapping[str, Any]
"""One sample: {field: tensor of any rank, or what else the family's ``collate`` takes}."""
Batch = Mapping[str, Any]
"""Several samples: {field: stacked tensor, or a list with an item per sample}."""
LATENTS, PROMPT_EMBEDS = "latents", "prompt_embeds"
"""Fields of the diffusion families' samples: (C, F, H, W) or (C, H, W), and (L, D)."""
PROMPT_MASK = "prompt_mask"
"""Field of a batch: (B, L) bool, True at tokens; None where nothing is padded."""


class Dataset(Protocol):
    """Samples ready for the model, in a fixed order. Shuffling belongs to the training loop."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return sample ``index`` in [0, len): the same tensors on every call, rank and run.

        Tensors are on the CPU. Diffusion families take float32 ``latents`` (C, F, H, W) in about
        [-1, 1] and ``prompt_embeds`` (L, D).
        """
        ...

    def name(self, index: int) -> str:
        """Return a short label of sample ``index`` for people: its prompt, class or file.

        Where labels are not different, a method ``key`` says which samples are copies of one.
        """
        ...


def stack(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal shapes, field by field: the usual ``Family.collate``."""
    return {field: torch.stack([one[field] for one in samples]) for field in samples[0]}


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack sequences of several lengths, zeros behind the shorter ones.

    Args:
        sequences: B tensors (L, ...), equal but for L.

    Returns:
        (B, longest, ...), and a mask (B, longest), True where a sequence has an element; None
        where all are of one length.
    """
    lengths = torch.tensor([len(one) for one in sequences])
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    padded = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return padded, None if bool(mask.all()) else mask


def to_device(value: Any, device: torch.device) -> Any:
    """Return a batch, or any part of it, with its tensors on ``device``."""
    if isinstance(value, Tensor):
        # From pinned memory the copy goes on beside the host; from other memory it waits by itself.
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_device(item, device) for item in value]
    return value
