"""Speeds of this device and its link, and what they mean for a live model.

It takes about a second of copies and matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.benchmark import Timer

from dist_layerlr.offload.predict import common_width, predict
from dist_layerlr.offload.prediction import GB, Layout, Machine, Prediction, Workload
from dist_layerlr.offload.stats import UnitInfo

SECONDS = 0.1
"""Least time that one speed is measured for."""
LONGEST = 8192
"""Rows of the measured matrix product; more are not faster."""


def predict_live(
    model: nn.Module,
    units: Sequence[UnitInfo],
    streamed: Collection[str],
    device: torch.device,
    work: Workload,
    *,
    window: int,
    dtype: torch.dtype | None,
    machine: Machine | None,
) -> Prediction:
    """Predict a step of a streamed model.

    Args:
        model: unsharded.
        units: of its handle.
        streamed: names of streamed parameters.
        device: where compute happens.
        work: what is computed; activations count as ``dtype``.
        window: units fetched ahead.
        dtype: computed in; None: that of the largest streamed parameter.
        machine: speeds; None: measured now.
    """
    parameters = dict(model.named_parameters())
    moving = [parameters[name] for name in streamed]
    resident = sum(u.device_bytes for u in units if u.resident)
    everything = sum(p.nbytes for p in parameters.values())
    layout = Layout(
        units=tuple(units),
        fixed_bytes=everything - sum(p.nbytes for p in moving) - resident,
        width=common_width(tuple(p.shape) for p in moving),
        stepped=sum(p.numel() for p in moving if p.requires_grad),
    )
    dtype = dtype or max(moving, key=lambda p: p.numel()).dtype
    if machine is None:
        machine = measure_machine(
            device, tokens=min(work.tokens, LONGEST), width=layout.width or 1024, dtype=dtype
        )
    return predict(layout, replace(work, activation_bytes=dtype.itemsize), machine, window=window)


def measure_machine(
    device: torch.device, *, tokens: int, width: int, dtype: torch.dtype, megabytes: int = 256
) -> Machine:
    """Measure the pinned link and the matrix products of a block.

    Args:
        device: an accelerator; on the CPU, copies in its own memory stand in for the link.
        tokens: rows of the product.
        width: columns; the matrix is (width, 4 * width), as a feed-forward layer's.
        dtype: computed in.
        megabytes: of one copy.
    """
    return Machine(
        gb_s=link_gb_s(device, megabytes=megabytes),
        tflops=gemm_tflops(device, tokens=tokens, width=width, dtype=dtype),
    )


def link_gb_s(
    device: torch.device, *, megabytes: int = 256, pinned: bool = True, back: bool = False
) -> float:
    """Bandwidth of copies to the device, or ``back`` from it, in 1e9 bytes per second."""
    pinned = pinned and device.type != "cpu"
    host = torch.empty(megabytes << 20, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    there = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target, source = (host, there) if back else (there, host)
    return host.numel() / GB / _seconds(device, lambda: target.copy_(source, non_blocking=True))


def gemm_tflops(device: torch.device, *, tokens: int, width: int, dtype: torch.dtype) -> float:
    """Achieved operations per second of (tokens, width) @ (width, 4 * width), in 1e12."""
    # A generator of its own: the user's random numbers must not depend on a prediction.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=dtype, generator=generator)
    weight = torch.randn(width, 4 * width, device=device, dtype=dtype, generator=generator)
    # Two operations for each of tokens * width * (4 * width) products.
    return 8.0 * tokens * width * width / 1e12 / _seconds(device, lambda: torch.mm(x, weight))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Median seconds of ``work``, after runs that warm up."""

    def now() -> float:
        # Timer's own clock waits for the current device, which need not be this one.
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    # The default of one thread would slow down the products that training computes with all.
    timer = Timer("work()", globals={"work": work}, timer=now, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median
