"""Frozen weights in 8 bits on the host, expanded on the device.

The contract: ``decode(encode(w))`` is computed in float32 by exactly rounded operations (one
division, one rounding to the 8-bit format; one multiplication, one rounding to the weight's dtype),
so host and device agree bit for bit, and training with ``host_dtype`` equals training a resident
model whose frozen weights went through ``round_trip`` once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""Largest number of each format; int8 is used symmetrically, without -128."""


def encode(weight: Tensor, host_dtype: str) -> tuple[Tensor, Tensor]:
    """Quantise by rows: the largest magnitude of a row maps to the format's largest number.

    Args:
        weight: (rows, ...) of a floating dtype; a vector is one row.
        host_dtype: ``float8_e4m3fn`` or ``int8`` (symmetric, half to even).

    Returns:
        codes (rows, columns) in the 8-bit dtype, and scales (rows, 1) in float32.
    """
    rows = weight.reshape(encoded_rows(weight.shape), -1).float()
    # A row of zeros gets the scale 1: 0 / 0 would make it NaN.
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST[host_dtype], torch.ones_like(largest))
    codes = (rows / scale).clamp(-_LARGEST[host_dtype], _LARGEST[host_dtype])
    dtype: torch.dtype = getattr(torch, host_dtype)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def decode(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """Expand into ``out``, whose elements number as the codes' do."""
    out.copy_((codes.float() * scale).view(out.shape))


def round_trip(weight: Tensor, host_dtype: str) -> Tensor:
    """The weight that training with ``host_dtype`` sees, in the weight's own dtype."""
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    decode(*encode(weight, host_dtype), out)
    return out


def encoded_rows(shape: torch.Size) -> int:
    """Number of scales: one per row of a matrix or kernel, one for a vector."""
    return shape[0] if len(shape) > 1 else 1
