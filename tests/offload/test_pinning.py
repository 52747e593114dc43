"""Page-locked memory, over the simulated runtime of a device."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.pinning import host_buffer
from dist_layerlr.offload.streaming import stream_on
from tests.offload.test_races import FULL, LORA, _stream
from tests.support.training import loss_of, make_optimizer, train

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
        assert "wf" in flags[area]
    handle.remove()


def test_a_forked_process_that_drops_the_model_frees_none_of_its_own_memory(device: str):
    model = FULL.model()
    handle, races = _stream(model, FULL, watch=False)
    sizes = list(races.locked.values())
    child = os.fork()
    if child == 0:
        own = [host_buffer(size).fill_(1) for size in sizes]
        waits: list[object] = []
        races.host_waits = waits.append
        del model, handle
        gc.collect()
        os._exit(0 if not waits and all(bool(part.all()) for part in own) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(races.locked) == len(sizes)
    handle.remove()


def test_a_forked_process_cannot_run_the_model(device: str):
    model = FULL.model()
    handle, _ = _stream(model, FULL, watch=False)
    train(model, make_optimizer(model), FULL, device, steps=1)  # threads run, in the parent alone
    child = os.fork()
    if child == 0:
        try:
            loss_of(model, FULL, 0, device).backward()
        except OffloadError as error:
            os._exit(0 if f"forked from {os.getppid()}" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    handle.remove()
