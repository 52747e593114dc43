"""Where the streaming benchmark runs: the device, its link, its speeds, and the arms for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from dist_layerlr.offload import measure
from dist_layerlr.offload.device import Immediate
from dist_layerlr.offload.prediction import GB, Machine
from streaming_arms import Arm, builders, ours
from streaming_model import ROWS, SMALL, Size

assert SMALL.flops is not None
CPU = Machine(gb_s=0.125, copy_us=500, tflops=SMALL.flops / 1e12)
"""Blocks of 4.2 MB take 34 ms; 192 tokens compute as long."""


class _Wait(float):
    """When compute began to wait, and until when it did."""

    def __new__(cls, begin: float, end: float) -> _Wait:
        """The number is the begin."""
        made = super().__new__(cls, begin)
        made.end = end
        return made

    end: float


class SimulatedLink(Immediate):
    """The CPU, with copies that a worker thread makes in order at the speed of a machine."""

    def __init__(self, machine: Machine, *, overlap: bool = True):
        super().__init__(torch.device("cpu"))
        self._machine, self._overlap = machine, overlap
        self._worker = ThreadPoolExecutor(1)
        self._free_at = 0.0

    def upload(
        self, target: Tensor, source: Tensor, after: Any, then: Callable[[], None] | None
    ) -> threading.Event:
        """Queue a copy.

        Compute before ``after`` is done: on the CPU it is done when it is asked for.
        """
        ready = threading.Event()
        begin = max(self._free_at, time.perf_counter())
        self._free_at = (
            begin + source.nbytes / (self._machine.gb_s * GB) + self._machine.copy_us * 1e-6
        )
        self._worker.submit(self._copy, target, source, then, self._free_at).add_done_callback(
            lambda _: ready.set()
        )
        self.last_upload = begin, self._free_at
        if not self._overlap:
            ready.wait()
        return ready

    def wait(self, ready: threading.Event) -> _Wait | None:
        """Make compute wait. Returns since when, or None if the copy was done."""
        if ready.is_set():
            return None
        reached = time.perf_counter()
        ready.wait()
        return _Wait(reached, time.perf_counter())

    def waited(self, reached: _Wait, ready: threading.Event) -> float:
        """What ``wait`` measured."""
        return reached.end - reached

    def finish(self, event: threading.Event) -> None:
        """Make the host wait."""
        event.wait()

    def _copy(
        self, target: Tensor, source: Tensor, then: Callable[[], None] | None, end: float
    ) -> None:
        target.copy_(source)
        if then is not None:
            then()
        time.sleep(max(0.0, end - time.perf_counter()))


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured where."""

    device: torch.device
    size: Size
    tokens: tuple[int, ...]
    rounds: int
    warmup: int
    exact: bool
    machine: Machine
    """On CUDA as measured in step 0: a matrix product, not a model."""

    @property
    def cuda(self) -> bool:
        """Whether the link is real."""
        return self.device.type == "cuda"

    def arms(self) -> dict[str, Callable[[], Arm]]:
        """{key: builder}."""
        if self.cuda:
            return builders(self.size, self.device)
        link, slow = (SimulatedLink(self.machine, overlap=overlap) for overlap in (True, False))
        return {
            "resident": builders(self.size, self.device)["resident"],
            "window1": partial(ours, self.size, link),
            "window2": partial(ours, self.size, link, window=2),
            "share0.50": partial(ours, self.size, link, share=0.5),
            "serial": partial(ours, self.size, slow, overlap=False),
        }

    def batch(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, text, target: the same for every arm."""
        generator = torch.Generator().manual_seed(tokens)
        rows = ROWS if self.size.flops is not None else tokens
        shapes = ((1, rows), (1, self.size.text), (1, rows))
        made = [torch.randn(*shape, self.size.width, generator=generator) for shape in shapes]
        x, text, target = (t.to(self.device, self.size.dtype) for t in made)
        return x, text, target


def measure_link(device: torch.device, size: Size) -> Machine:
    """Measure the link both ways, pinned and pageable, and a matrix product of a block's shape."""
    found = {
        f"{name}_{megabytes}mb_gb_s": measure.link_gb_s(device, megabytes=megabytes, **kind)
        for megabytes in (64, 256, 1024)
        for name, kind in (
            ("pinned", {}),
            ("pageable", {"pinned": False}),
            ("back", {"back": True}),
        )
    }
    found["both_ways_gb_s"] = both_ways_gb_s(device)
    found["tflops"] = measure.gemm_tflops(device, tokens=8192, width=size.width, dtype=size.dtype)
    machine = Machine(gb_s=found["pinned_1024mb_gb_s"], tflops=found["tflops"])
    t_star = torch.finfo(size.dtype).bits / 8 * machine.tflops * 1e12 / (2 * machine.gb_s * GB)
    print(
        ", ".join(f"{k} {v:.1f}" for k, v in found.items()), f"-> hidden from {t_star:,.0f} tokens"
    )
    return machine


def both_ways_gb_s(device: torch.device, *, megabytes: int = 256) -> float:
    """Sum of both directions of the link, copied at once on two streams."""
    size = megabytes << 20
    hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(there[1], non_blocking=True)

    # Timer waits for the device in front of and behind every run.
    return 2 * size / GB / Timer("copy()", globals={"copy": copy}).timeit(5).median
