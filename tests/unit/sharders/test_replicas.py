"""The number that stands for a tensor's bits when ranks compare what they hold."""

from __future__ import annotations

import pytest
import torch

from dist_layerlr.sharders import replicas
from dist_layerlr.sharders.replicas import fingerprint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_have_equal_fingerprints_in_every_dtype(dtype: torch.dtype) -> None:
    values = (torch.arange(40) % 7).to(dtype)
    assert fingerprint(values) == fingerprint(values.clone())
    other = values.clone()
    other[17] = (other[17] == 0).to(dtype) if dtype is torch.bool else other[18]
    if not torch.equal(other, values):
        assert fingerprint(other) != fingerprint(values)


def test_one_bit_a_swap_and_a_rotation_of_chunks_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 16)
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    nudged, swapped = values.clone(), values.clone()
    nudged[40] = torch.nextafter(values[40], torch.tensor(9.0))
    swapped[[3, 50]] = values[[50, 3]]
    seen = {int(fingerprint(t)) for t in (values, nudged, swapped, values.roll(16))}
    assert len(seen) == 4
