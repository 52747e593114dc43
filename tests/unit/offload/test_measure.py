"""Measured speeds are those of the device at hand."""

from __future__ import annotations

import time

import pytest
import torch

from dist_layerlr.offload import measure


def test_a_machine_is_measured_in_a_moment_and_its_speeds_are_plausible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The clock of this process alone: other work on the machine does not make it slow.
    monkeypatch.setattr(measure.time, "perf_counter", time.process_time)
    found = measure.measure_machine(
        torch.device("cpu"), tokens=64, width=128, dtype=torch.float32, megabytes=8
    )
    assert 0.1 < found.gb_s < 1000
    assert 1e-4 < found.tflops < 100


def test_work_of_every_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    monkeypatch.setattr(measure, "SECONDS", 1e-4)
    for kind in ("xpu", "cpu"):
        measure._seconds(torch.device(kind), lambda: time.sleep(1e-4))
    assert {device.type for device in waited} == {"xpu"}
