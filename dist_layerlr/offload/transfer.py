"""Fetches: copies of a unit's payload into a slot.

They start straight from pinned masters, or pass through pinned staging buffers that a worker thread
fills.
"""

from __future__ import annotations

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dist_layerlr.offload.device import Backend, Event
from dist_layerlr.offload.masters import Unit, aligned
from dist_layerlr.offload.meter import UPLOAD, Meter

MOST_STAGING = 3
"""Staging buffers: one that is copied from, one that is filled, and one between them."""


@dataclass(slots=True)
class Slot:
    """Device memory for one unit."""

    memory: Tensor
    """Bytes."""
    typed: dict[torch.dtype, Tensor] = field(default_factory=dict)
    """The same memory as tensors of each dtype that the model's units have."""
    views: dict[int, list[Tensor]] = field(default_factory=dict)
    """{unit: its parameters' views of the memory} of units that were in the slot."""
    free: Event = None
    """A point in the compute stream behind the last use of the slot; None: somebody still refers to
    it. Point 2 of [Note: stream order]."""


@dataclass(slots=True)
class _Staging:
    """A pinned buffer for one payload."""

    memory: Tensor
    sent: Event = None
    """A point in the copy stream behind the last copy out of the buffer."""


class Fetcher:
    """Copies units into slots."""

    def __init__(self, backend: Backend, units: list[Unit], pool_bytes: int | None):
        """Pin the masters; allocate staging if they exceed ``pool_bytes`` or stand alone."""
        self._backend, self.meter = backend, Meter(backend)
        self.limited = pool_bytes is not None
        """Whether host memory may be pinned up to a limit only."""
        self.fetches = self.nbytes = 0
        self._last: Event = None
        """The fetch that was asked for last."""
        self._pinned: list[Tensor] = []
        self._worker: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        encoded = max((u.host_bytes for u in units if u.encoded), default=0)
        # Encoded payloads land here and are expanded into the slot from here.
        self._payload = backend.allocate(aligned(encoded)) if encoded else None
        try:
            self._pin_masters_or_staging(units, pool_bytes)
        except BaseException:
            # Memory that is locked already would stay locked.
            self.close()
            raise

    def _pin_masters_or_staging(self, units: list[Unit], pool_bytes: int | None) -> None:
        total = sum(u.host_bytes for u in units)
        arenas = [u.arena for u in units if u.arena is not None]
        if len(arenas) == len(units) and (pool_bytes is None or total <= pool_bytes):
            for arena in arenas:
                self._pin(arena)
            return
        largest = max(u.host_bytes for u in units)
        count = MOST_STAGING if pool_bytes is None else min(MOST_STAGING, pool_bytes // largest)
        for _ in range(count):
            memory = self._backend.host_buffer(largest, pinned=True)
            self._pin(memory)
            self._idle.put(_Staging(memory))
        # One thread, so that copies start in the order in which they were asked for.
        self._worker = ThreadPoolExecutor(
            1, "offload-staging", initializer=self._backend.enter_thread
        )

    def _pin(self, memory: Tensor) -> None:
        self._backend.pin(memory)
        self._pinned.append(memory)

    def fetch(self, unit: Unit, slot: Slot) -> Event:
        """Start the copy. The result is for ``queued``."""
        # Point 2 of [Note: stream order]. While somebody referred to the slot no event was
        # recorded. That use has been queued by now, so the event is recorded here.
        after = self._backend.mark() if slot.free is None else slot.free
        self.fetches += 1
        self.nbytes += unit.host_bytes
        if self._worker is not None:
            self._last = self._worker.submit(self._upload_staged, unit, slot, after)
        else:
            assert unit.arena is not None
            self._last = self._upload(unit, slot, unit.arena, after)
        return self._last

    def queued(self, fetch: Event) -> Event:
        """The point behind a fetch."""
        # The host waits for the staging thread: until that has queued the copy there is no event.
        return fetch.result() if isinstance(fetch, Future) else fetch

    def release_masters(self) -> None:
        """Make the host wait until no copy reads the masters, so that the caller may write them.

        Point 6 of [Note: stream order].
        """
        # The last copy is enough: both the worker and the copy stream keep their order.
        last, self._last = self._last, None
        if isinstance(last, Future):
            # The worker has read the masters when the future is done; the device reads its staging
            # buffer. An error is told to whoever needs the unit.
            last.exception()
        elif last is not None:
            self._backend.finish(last)

    def close(self) -> None:
        """Finish all copies and unlock the memory."""
        if self._worker is not None:
            self._worker.shutdown()
        # The device may still read the memory that is unlocked below.
        self._backend.synchronize()
        for memory in self._pinned:
            self._backend.unpin(memory)
        self._pinned, self._payload = [], None

    def _upload_staged(self, unit: Unit, slot: Slot, after: Event) -> Event:
        """Copy through a staging buffer. Runs on the worker's thread, one copy at a time."""
        staging = self._idle.get()
        try:
            # The copy engine reads the buffer until then; the host must not write to it before.
            if staging.sent is not None:
                self._backend.finish(staging.sent)
            staging.sent = self._upload(unit, slot, unit.fill(staging.memory), after)
            return staging.sent
        finally:
            # Also after an error: a buffer that is lost makes the next fetch wait for ever.
            self._idle.put(staging)

    def _upload(self, unit: Unit, slot: Slot, source: Tensor, after: Event) -> Event:
        if not unit.encoded:
            target, then = slot.memory[: unit.host_bytes], None
        else:
            assert self._payload is not None
            # One buffer is enough: the next copy into it lies behind this expansion in the copy
            # stream.
            target = self._payload[: unit.host_bytes]
            then = partial(_expand, unit, target, slot)
        ready = self._backend.upload(target, source, after, then)
        self.meter.add(UPLOAD, unit.name, self._backend.last_upload, unit.host_bytes)
        return ready


def _expand(unit: Unit, payload: Tensor, slot: Slot) -> None:
    """Decode a payload into the slot. Runs in the copy stream, behind the copy."""
    for master in unit.masters:
        master.expand(payload, master.view_in(slot.typed[master.dtype]))
