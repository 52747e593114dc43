"""Measured speeds are those of the device at hand."""

from __future__ import annotations

import torch

from dist_layerlr.offload import measure


def test_a_machine_is_measured_in_a_moment_and_its_speeds_are_plausible() -> None:
    found = measure.measure_machine(
        torch.device("cpu"), tokens=64, width=128, dtype=torch.float32, megabytes=8
    )
    assert 0.1 < found.gb_s < 1000
    assert 1e-4 < found.tflops < 100
