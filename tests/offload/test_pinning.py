"""Page-locked memory, over the simulated runtime of a device."""

from __future__ import annotations

import pytest
import torch

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.streaming import stream_on
from tests.offload.test_races import FULL, LORA, _stream

pytestmark = pytest.mark.parametrize("device", ["sim"])


def test_memory_that_cannot_be_locked_is_an_error_that_the_next_kernel_does_not_see(device: str):
    from tests.support.races import Detector

    model, backend = LORA.model(), Detector()
    backend.races.refuse_locks = True
    with pytest.raises(OffloadError, match="page-lock .* pinned_pool_mb lower"):
        stream_on(backend, model, LORA.policy())
    torch.ones(2).to(device) + 1
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_locked_memory_is_kept_from_forked_processes(device: str):
    handle, races = _stream(FULL.model(), FULL, watch=False)
    flags: dict[int, list[str]] = {}
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            start = int(line.split("-")[0], 16)
        if line.startswith("VmFlags"):
            flags[start] = line.split()[1:]
    for address in races.locked:
        area = max(start for start in flags if start <= address)
        assert "dc" in flags[area]
    handle.remove()
