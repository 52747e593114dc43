"""How long copies, waits and units take, by the clock of the device.

Points are timed when they are queued and read when the device has passed them, so nothing here
makes the host wait.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dist_layerlr.offload.device import Backend, Event, Span

UPLOAD, DOWNLOAD, WAIT, COMPUTE = "copy", "gradients", "wait", "compute"
"""Kinds of work: a unit to the device, gradients to the host, compute that waits, and compute."""


class Timed(NamedTuple):
    """Some work, in seconds from the begin of a recording."""

    kind: str
    unit: str
    begin: float
    seconds: float
    nbytes: int
    backward: bool


class _Pending(NamedTuple):
    """Work whose length is not known yet."""

    kind: str
    unit: str
    begin: Event
    end: Event
    nbytes: int
    backward: bool


class Meter:
    """Sums the time of each kind of work, and keeps every piece of it while it records."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._pending: deque[_Pending] = deque()
        self._lock = threading.Lock()
        self.counts = dict.fromkeys((UPLOAD, DOWNLOAD, WAIT, COMPUTE), 0)
        """{kind: pieces that took any time}."""
        self.seconds = dict.fromkeys((UPLOAD, DOWNLOAD, WAIT, COMPUTE), 0.0)
        """{kind: seconds}."""
        self._start: Event = None
        """Begin of a recording; None: nothing is recorded."""
        self._found: list[Timed] = []
        self._entered: tuple[str, bool, Event] | None = None
        """(unit, whether in backward, begin) of the unit that computes now."""
        self._range: object = None
        """Its range for NVIDIA's profilers."""

    def add(
        self, kind: str, unit: str, span: Span | None, nbytes: int = 0, *, backward: bool = False
    ) -> None:
        """Note a piece of work; without a span its time is not known."""
        if span is not None:
            self._pending.append(_Pending(kind, unit, *span, nbytes, backward))
        # All that is over is read now, so that the list stays short.
        self.read()

    def enter(self, unit: str, *, backward: bool) -> None:
        """A unit begins to compute."""
        if self._start is not None:
            self._entered = unit, backward, self._backend.now()
            if self._backend.device.type == "cuda":
                # By number, not as a stack, which each thread has for itself: a unit may be left in
                # autograd's thread.
                label = f"{unit} {'backward' if backward else 'forward'}"
                self._range = torch.cuda.nvtx.range_start(label)

    def leave(self) -> None:
        """It ends."""
        if self._entered is None:
            return
        (unit, backward, begin), self._entered = self._entered, None
        if self._backend.device.type == "cuda":
            torch.cuda.nvtx.range_end(self._range)
        self.add(COMPUTE, unit, (begin, self._backend.now()), backward=backward)

    def read(self) -> None:
        """Sum what is over by now."""
        # The staging thread adds its copies beside autograd's.
        with self._lock:
            while self._pending:
                work = self._pending[0]
                # A copy that ended before compute got there kept it waiting no time.
                length = self._backend.waited if work.kind == WAIT else self._backend.seconds
                seconds = length(work.begin, work.end)
                if seconds is None:
                    return
                self._pending.popleft()
                self.counts[work.kind] += seconds > 0
                self.seconds[work.kind] += seconds
                self._keep(work, seconds)

    def _keep(self, work: _Pending, seconds: float) -> None:
        if self._start is not None:
            begin = self._backend.seconds(self._start, work.begin)
            assert begin is not None  # it lies in front of what is over
            self._found.append(
                Timed(work.kind, work.unit, begin, seconds, work.nbytes, work.backward)
            )

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Timed]]:
        """Keep what happens inside the block; the list is complete behind it."""
        self._backend.synchronize()
        self.read()
        self._found, self._start = [], self._backend.now()
        try:
            yield self._found
        finally:
            self.leave()
            self._backend.synchronize()
            self.read()
            self._start = None
