"""Sound as LTX-2's audio VAE takes it: logarithmic mel spectrograms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dist_layerlr.errors import ModelSourceError

WINDOW = 1024
"""Samples of a frame of the spectrogram."""
_FLOOR = 1e-5
"""Least magnitude before the logarithm."""
CHANNELS = 2


def log_mel(sound: Tensor, rate: int, *, bins: int, hop: int) -> Tensor:
    """Return the spectrogram (2, T, bins) of a sound.

    Args:
        sound: (channels, samples) in [-1, 1]; one channel is heard on both sides.
        rate: Samples per second.
        bins: Of the mel scale, from 0 to half the rate.
        hop: Samples from one frame to the next.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(
        WINDOW // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney"
    )
    options: dict[str, Any] = {"power": 1.0, "center": True, "pad_mode": "reflect"}
    options |= {"mel_filters": filters, "mel_floor": _FLOOR, "log_mel": "log"}
    found = []
    for channel in stereo(sound):
        window = window_function(WINDOW, "hann")
        made = spectrogram(channel.double().numpy(), window, WINDOW, hop, **options)
        found.append(torch.from_numpy(made).T)
    return torch.stack(found).float()


def stereo(sound: Tensor) -> Tensor:
    """Return two channels.

    Raises:
        ModelSourceError: More than two.
    """
    if sound.ndim != 2 or len(sound) not in (1, CHANNELS):
        raise ModelSourceError(
            f"The sound has shape {tuple(sound.shape)}. This model needs (channels, samples) with"
            " 1 or 2 channels; mix it down: ffmpeg -i IN -ac 2 OUT.wav."
        )
    return sound.expand(CHANNELS, -1)


def fitted(values: Tensor, length: int) -> Tensor:
    """Cut the last but one axis to ``length``, or fill it with zeros at its end."""
    missing = length - values.shape[-2]
    if missing <= 0:
        return values[..., :length, :]
    return torch.nn.functional.pad(values, (0, 0, 0, missing))
