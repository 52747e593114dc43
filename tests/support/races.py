"""Queues over `sim` with vector clocks: every access to memory is checked for an order.

The backend is the real ``Accelerator``; its queues and its pinning come from here. Values are
computed at once, in program order. What would be late on a device is checked, not simulated:

RACE: two accesses of one storage, one a write, on queues that nothing orders.
FREED: memory went back to the allocator while another queue may still use it.
HOSTWRITE: the host wrote memory that a queued copy reads.
UNREGISTERED: memory was unlocked while a queued copy reads it.
SERIAL: compute of a unit waits for the copy of a later one.
DEVICE: a thread of ours uses the device without having made it its own.

``query()`` is false until the host has waited, and copies to the host are poison until then. The
clock of each queue counts milliseconds of kernels and copies, as set.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.offload.device import Accelerator
from dist_layerlr.offload.internals import storage_key
from dist_layerlr.offload.pinning import Registered
from tests.support import sim_device

Clock = dict[int, int]
"""{queue: how many of its accesses are over}."""
Access = tuple[int, int]
"""(queue, its number there)."""


def _merge(into: Clock, other: Clock) -> None:
    for queue, number in other.items():
        into[queue] = max(number, into.get(queue, 0))


def _over(access: Access, clock: Clock) -> bool:
    return clock.get(access[0], 0) >= access[1]


class Event:
    """A point in a queue."""

    def __init__(self, races: Races, clock: Clock, at_ms: float):
        self._races, self.clock, self.at_ms = races, dict(clock), at_ms

    def query(self) -> bool:
        with self._races.lock:
            return all(self._races.host.get(q, 0) >= n for q, n in self.clock.items())

    def synchronize(self) -> None:
        self._races.check_thread()
        self._races.host_waits(self.clock)

    def elapsed_time(self, end: Event) -> float:
        return end.at_ms - self.at_ms


class Queue:
    """Work in order."""

    def __init__(self, races: Races, number: int):
        self._races, self.number = races, number
        self.clock: Clock = {}
        self.at_ms = 0.0

    def wait_event(self, event: Event) -> None:
        with self._races.lock:
            _merge(self.clock, event.clock)
            self.at_ms = max(self.at_ms, event.at_ms)

    def launch(self, ms: float) -> Access:
        _merge(self.clock, self._races.host)
        self.clock[self.number] = self.clock.get(self.number, 0) + 1
        self.at_ms += ms
        return self.number, self.clock[self.number]


class _Shadow:
    """Who used a storage last."""

    def __init__(self, owner: Queue, write: Access, ref: Any):
        self.owner, self.write, self.ref = owner, write, ref
        self.reads: Clock = {}

    def accesses(self) -> list[Access]:
        return [self.write, *self.reads.items()]


class Races:
    """The queues of one simulated device, and what went wrong on it."""

    def __init__(self, *, kernel_ms: float = 1.0, copy_ms: float = 1.0):
        self.found: list[str] = []
        self.host: Clock = {}
        """What the host knows to be over."""
        self.lock = threading.RLock()
        self.entered: list[str] = []
        """Names of the threads that made the device their own, in order."""
        self.locked: dict[int, int] = {}
        """{address: bytes} of pinned memory."""
        self.refuse_locks = self.failed = False
        self.overlapped = 0
        """Copies that were on their way beside the compute of an earlier unit."""
        self._kernel_ms, self._copy_ms = kernel_ms, copy_ms
        self._queues: list[Queue] = []
        self._compute = self.new()
        self._shadows: dict[int, _Shadow] = {}
        self._shared: set[int] = set()
        """Storages that another queue than their own has used."""
        self._up: list[tuple[Access, Tensor, str]] = []
        """(copy, host memory that it reads, digest of that)."""
        self._down: list[tuple[Access, Tensor, Tensor]] = []
        """(copy, host memory that it writes, values)."""
        self._local = threading.local()
        sim_device.observer = self

    # Queues

    def new(self) -> Queue:
        self._queues.append(Queue(self, len(self._queues)))
        return self._queues[-1]

    def current(self) -> Queue:
        stack = getattr(self._local, "stack", ())
        return stack[-1] if stack else self._compute

    @contextmanager
    def use(self, queue: Queue) -> Iterator[None]:
        self._local.__dict__.setdefault("stack", []).append(queue)
        try:
            yield
        finally:
            self._local.stack.pop()

    def enter(self) -> None:
        self._local.entered = True
        self.entered.append(threading.current_thread().name)

    def check_thread(self) -> None:
        """A fresh thread's device is another; those of autograd and the caller are not ours."""
        ours = threading.current_thread().name.startswith("offload-")
        if ours and not hasattr(self._local, "entered"):
            self.found.append("DEVICE: a thread uses an event, and its device is number 0")

    def record(self, queue: Queue) -> Event:
        self.check_thread()
        with self.lock:
            _merge(queue.clock, self.host)
            return Event(self, queue.clock, queue.at_ms)

    def synchronise(self) -> None:
        clock: Clock = {}
        for queue in self._queues:
            _merge(clock, queue.clock)
        self.host_waits(clock)

    # Pinning

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.refuse_locks:
            self.failed = True
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        with self.lock:
            size = self.locked.pop(address)
            for _, source, _ in self._up:
                if address <= source.data_ptr() < address + size:
                    self.found.append("UNREGISTERED: a queued copy reads memory that is unlocked")
        return 0

    # What the device does

    def host_waits(self, clock: Clock) -> None:
        with self.lock:
            _merge(self.host, clock)
            for item in [item for item in self._up if _over(item[0], self.host)]:
                self._up.remove(item)
                self._compare(item[1], item[2])
            for copy in [copy for copy in self._down if _over(copy[0], self.host)]:
                self._down.remove(copy)
                copy[1].copy_(copy[2])

    def check(self) -> None:
        """Nothing went wrong so far."""
        with self.lock:
            for _, source, digest in self._up:
                self._compare(source, digest)
            self._bury()
        assert not self.found, self.found[:5]

    def born(self, storage: int, ref: Any) -> None:
        with self.lock:
            queue = self.current()
            # A fill, as deterministic algorithms make one of each new tensor.
            self._shadows[storage] = _Shadow(queue, queue.launch(0.0), ref)
            self._shared.discard(storage)

    def kernel(self, name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        with self.lock:
            if self.failed:
                self.failed = False
                raise RuntimeError("CUDA error: out of memory (of an earlier call)")
            self._access(name, reads, writes, self._kernel_ms)

    def copy(self, source: Tensor, target: Tensor, wait: bool) -> bool:
        """A copy; returns whether the values are to be copied now."""
        up, down = source.device.type == "cpu", target.device.type == "cpu"
        with self.lock:
            reads, writes = [] if up else [source], [] if down else [target]
            access = self._access("copy", reads, writes, self._copy_ms if up or down else 1.0)
            if wait and (up or down):
                self.host_waits(self.current().clock)
            elif up:
                # Another tensor on the same memory: a queued copy keeps no tensor of its caller's.
                memory = torch.empty(0, dtype=torch.uint8).set_(source.untyped_storage())
                start = source.storage_offset() * source.element_size()
                memory = memory[start : start + source.nbytes]
                self._up.append((access, memory, _digest(memory)))
            elif down:
                values = sim_device._values(source).clone()
                target.fill_(float("nan"))
                self._down.append((access, target, values))
                return False
        return True

    def _access(self, name: str, reads: list[Tensor], writes: list[Tensor], ms: float) -> Access:
        self._bury()
        queue = self.current()
        access = queue.launch(ms)
        for tensor, writing in [*((t, True) for t in writes), *((t, False) for t in reads)]:
            shadow = self._shadows.get(storage_key(tensor))
            if shadow is None:
                continue
            for old in shadow.accesses() if writing else [shadow.write]:
                if not _over(old, queue.clock):
                    does = "writes" if writing else "reads"
                    self.found.append(
                        f"RACE: {name} on queue {queue.number} {does} what {old} uses"
                    )
            if queue is not shadow.owner:
                self._shared.add(storage_key(tensor))
            if writing:
                shadow.write, shadow.reads = access, {}
            else:
                shadow.reads[queue.number] = access[1]
        return access

    def _bury(self) -> None:
        for key in [key for key in self._shared if self._shadows[key].ref.expired()]:
            self._shared.discard(key)
            shadow = self._shadows.pop(key)
            known = dict(shadow.owner.clock)
            _merge(known, self.host)
            if not all(_over(access, known) for access in shadow.accesses()):
                self.found.append(f"FREED: memory of queue {shadow.owner.number} is still in use")

    def _compare(self, source: Tensor, digest: str) -> None:
        if _digest(source) != digest:
            self.found.append("HOSTWRITE: memory that a queued copy reads was written")


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


class Detector(Accelerator):
    """The real backend, over queues that are watched."""

    def __init__(self, **speeds: float):
        device = torch.device("sim", 0)
        self.races = Races(**speeds)
        super().__init__(device, self.races, Registered(self.races, device, self.races.synchronise))

    def free_bytes(self) -> int | None:
        return None


def watch_overlap(handle: Any) -> None:
    """Have compute of each unit checked: it waits for no copy of a later one."""
    copies, races = handle._engine.copies, handle._backend.races
    bring = copies.bring

    def bringing(unit: int, *, backward: bool) -> Any:
        before = dict(copies._ready)
        slot = bring(unit, backward=backward)
        for other, fetch in copies._ready.items():
            if other != unit and before.get(other) is not fetch:
                event = copies.fetcher.queued(fetch)
                if all(races.current().clock.get(q, 0) >= n for q, n in event.clock.items()):
                    races.found.append(f"SERIAL: unit {unit} waits for the copy of {other}")
                else:
                    races.overlapped += 1
        return slot

    copies.bring = bringing
