"""Fetches: straight from pinned masters, or through pinned staging buffers that a worker thread
fills.
"""

from __future__ import annotations

import queue
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dist_layerlr.offload.device import Backend, Event, host_buffer
from dist_layerlr.offload.masters import Unit, aligned

MEBIBYTE = 2**20
MOST_STAGING = 3


@dataclass(slots=True)
class Slot:
    """Device memory for one unit."""

    memory: Tensor
    """Bytes."""
    typed: dict[torch.dtype, Tensor] = field(default_factory=dict)
    """The same, by dtype."""
    free: Event = None
    """Behind the last use; None: not known yet. Point 2 of [Note: stream order]."""


@dataclass(slots=True)
class _Staging:
    memory: Tensor
    sent: Event = None
    """Behind the last copy out of it."""


class Fetcher:
    """Copies units into slots."""

    def __init__(self, backend: Backend, units: list[Unit], pool_bytes: int | None):
        """Pin the masters, or allocate staging where they do not fit ``pool_bytes`` or stand
        alone.
        """
        self._backend = backend
        self.fetches = self.nbytes = 0
        self._pinned: list[Tensor] = []
        self._worker: ThreadPoolExecutor | None = None
        self._idle: queue.SimpleQueue[_Staging] = queue.SimpleQueue()
        encoded = max((u.host_bytes for u in units if u.encoded), default=0)
        self._payload = backend.allocate(aligned(encoded)) if encoded else None
        try:
            self._lock(units, pool_bytes)
        except BaseException:
            self.close()
            raise

    def _lock(self, units: list[Unit], pool_bytes: int | None) -> None:
        total = sum(u.host_bytes for u in units)
        alone = any(u.arena is None for u in units)
        if not alone and (pool_bytes is None or total <= pool_bytes):
            for unit in units:
                assert unit.arena is not None
                self._pin(unit.arena)
            return
        largest = max(u.host_bytes for u in units)
        count = MOST_STAGING if pool_bytes is None else min(MOST_STAGING, pool_bytes // largest)
        for _ in range(count):
            memory = host_buffer(largest)
            self._pin(memory)
            self._idle.put(_Staging(memory))
        self._worker = ThreadPoolExecutor(1, "offload-staging")

    def _pin(self, memory: Tensor) -> None:
        self._backend.pin(memory)
        self._pinned.append(memory)

    def fetch(self, unit: Unit, slot: Slot) -> Event:
        """Start the copy. The result is for ``wait``."""
        after = (
            self._backend.mark() if slot.free is None else slot.free
        )  # point 2 of [Note: stream order]
        self.fetches += 1
        self.nbytes += unit.host_bytes
        if self._worker is not None:
            return self._worker.submit(self._staged, unit, slot, after)
        assert unit.arena is not None
        return self._upload(unit, slot, unit.arena, after)

    def wait(self, ready: Event) -> bool:
        """Make compute wait for a fetch: point 1 of [Note: stream order].

        Returns whether it had to.
        """
        return self._backend.wait(ready.result() if isinstance(ready, Future) else ready)

    def close(self) -> None:
        """Finish all copies and unlock the memory."""
        if self._worker is not None:
            self._worker.shutdown()
        self._backend.synchronize()
        for memory in self._pinned:
            self._backend.unpin(memory)
        self._pinned, self._payload = [], None

    def _staged(self, unit: Unit, slot: Slot, after: Event) -> Event:
        """On the worker's thread, one at a time, so that copies keep their order."""
        staging = self._idle.get()
        try:
            if staging.sent is not None:
                self._backend.finish(staging.sent)
            staging.sent = self._upload(unit, slot, unit.fill(staging.memory), after)
            return staging.sent
        finally:
            self._idle.put(staging)

    def _upload(self, unit: Unit, slot: Slot, source: Tensor, after: Event) -> Event:
        if not unit.encoded:
            return self._backend.upload(slot.memory[: unit.host_bytes], source, after, None)
        assert self._payload is not None
        payload = self._payload[: unit.host_bytes]
        return self._backend.upload(payload, source, after, partial(_expand, unit, payload, slot))


def _expand(unit: Unit, payload: Tensor, slot: Slot) -> None:
    """One buffer is enough: the next copy into it is behind this in the copy stream."""
    for piece in unit.pieces:
        piece.expand(payload, piece.on(slot.typed[piece.dtype]))
