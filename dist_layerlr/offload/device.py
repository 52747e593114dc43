"""The device: memory, copies, and what waits for what.

One implementation for devices with queues, one where copies are immediate.

[Note: stream order]
Three queues: the compute stream (whatever stream the model runs on), the copy stream (host to
device, in order), the gradient stream (device to host). The host waits for the device
where a staging buffer is used again, and at point 6.

1. *ready*: recorded on the copy stream behind a unit's copy (and expansion). The compute stream
   waits for it before the unit's first kernel.
2. *free*: recorded on the compute stream when the NEXT unit is needed, that is behind the last
   kernel that used the slot, in forward and in backward. (Recorded after the forward alone it comes
   too early: backward still reads the slot.) The copy stream waits for it before it overwrites the
   slot. A slot that somebody still refers to at that moment gets no such event; it is recorded when
   the slot is taken. Each event lies behind the one before, which may be another stream's.
3. Copies into one slot need no event between them: the copy stream keeps their order.
4. Gradients: the gradient stream waits for the compute stream before the copies of each group; the
   gradients are kept alive until the host has seen the event behind them, so that the allocator
   cannot hand out their memory.
5. The ring is allocated once, on the compute stream, and never freed while streaming: nothing to
   record with the allocator, and a bound on how far the host can run ahead.
6. *masters*: the caller may write to them when he has them back. So the host waits for the last
   copy that reads them: behind a forward without gradients, behind a backward, and before an
   optimizer steps. (Behind a forward with gradients it does not: backward follows.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.pinning import Handed, Pins, Registered, host_buffer
from dist_layerlr.offload.queues import Queues, TorchQueues

Event = Any
"""A point in a queue."""


Span = tuple[Event, Event]
"""Two timed points of one queue: where some work begins, and where it ends."""


class Backend(Protocol):
    """A device and its queues."""

    device: torch.device
    last_upload: Span | None
    """The copy that ``upload`` was asked for last."""
    last_download: Span | None
    """The copies that ``download`` was asked for last."""

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory, bytes, that compute may use at once."""
        ...

    def upload(
        self, target: Tensor, source: Tensor, after: Event, then: Callable[[], None] | None
    ) -> Event:
        """Copy host bytes to the device behind ``after``, then run ``then`` in the same queue.

        Returns *ready*.
        """
        ...

    def wait(self, ready: Event) -> Event:
        """Make compute wait for a copy.

        Returns where compute was; None: the copy had finished.
        """
        ...

    def waited(self, reached: Event, ready: Event) -> float | None:
        """Seconds that compute, at the point ``reached``, waited; None: not known yet."""
        ...

    def mark(self, behind: Event = None) -> Event:
        """Where compute is now, and behind another point of it."""
        ...

    def now(self) -> Event:
        """A timed point of compute."""
        ...

    def seconds(self, begin: Event, end: Event) -> float | None:
        """From one timed point to another; None: not known yet."""
        ...

    def download(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Event:
        """Copy several tensors to the host, behind all compute so far."""
        ...

    def finish(self, event: Event) -> None:
        """Make the host wait."""
        ...

    def enter_thread(self) -> None:
        """Prepare a thread that was just started to use the device."""
        ...

    def host_buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        """Host bytes; with ``pinned``, ``pin`` will be called for them."""
        ...

    def pin(self, tensor: Tensor) -> None:
        """Page-lock a host buffer."""
        ...

    def unpin(self, tensor: Tensor) -> None:
        """Undo ``pin``."""
        ...

    def free_bytes(self) -> int | None:
        """Free device memory, or None where the device has none of its own."""
        ...

    def synchronize(self) -> None:
        """Make the host wait for everything."""
        ...


class Immediate:
    """A device whose copies happen when they are asked for."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last_upload: Span | None = None
        self.last_download: Span | None = None

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def upload(
        self, target: Tensor, source: Tensor, after: Event, then: Callable[[], None] | None
    ) -> Event:
        """Copy now."""
        begin = self.now()
        target.copy_(source)
        if then is not None:
            then()
        self.last_upload = begin, self.now()

    def wait(self, ready: Event) -> Event:
        """Nothing to wait for."""

    def waited(self, reached: Event, ready: Event) -> float | None:
        """Nobody did."""
        return 0.0

    def mark(self, behind: Event = None) -> Event:
        """One queue, so any point will do."""
        return True

    def now(self) -> Event:
        """By the clock of the host."""
        return time.perf_counter()

    def seconds(self, begin: Event, end: Event) -> float | None:
        """By the clock of the host."""
        return float(end - begin)

    def download(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Event:
        """Copy now."""
        begin = self.now()
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        self.last_download = begin, self.now()

    def finish(self, event: Event) -> None:
        """Nothing to wait for."""

    def enter_thread(self) -> None:
        """Nothing to prepare."""

    def host_buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        """Pageable."""
        return host_buffer(nbytes)

    def pin(self, tensor: Tensor) -> None:
        """Nothing to lock."""

    def unpin(self, tensor: Tensor) -> None:
        """Nothing to lock."""

    def free_bytes(self) -> int | None:
        """None: the host's own memory."""
        return None

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Accelerator:
    """A device with queues: CUDA, ROCm, XPU, NPU. Their order: see [Note: stream order]."""

    def __init__(self, device: torch.device, queues: Queues, pins: Pins):
        self.device = device
        self._queues, self._pins = queues, pins
        self._copies, self._gradients = queues.new(), queues.new()
        self.last_upload: Span | None = None
        self.last_download: Span | None = None

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory of the compute stream: point 5 of [Note: stream order]."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def upload(
        self, target: Tensor, source: Tensor, after: Event, then: Callable[[], None] | None
    ) -> Event:
        """Points 1 to 3 of [Note: stream order]."""
        self._copies.wait_event(after)
        # Behind the wait, so that the time until the slot is free is none of the copy's.
        begin = self._queues.record(self._copies)
        with self._queues.use(self._copies):
            target.copy_(source, non_blocking=True)
            if then is not None:
                then()
        ready = self._queues.record(self._copies)
        self.last_upload = begin, ready
        return ready

    def wait(self, ready: Event) -> Event:
        """Point 1 of [Note: stream order]."""
        if ready.query():
            return None
        reached = self.mark()
        self._queues.current().wait_event(ready)
        return reached

    def waited(self, reached: Event, ready: Event) -> float | None:
        """By the clock of the device."""
        seconds = self.seconds(reached, ready)
        return None if seconds is None else max(0.0, seconds)

    def now(self) -> Event:
        """By the clock of the device."""
        return self._queues.record(self._queues.current())

    def seconds(self, begin: Event, end: Event) -> float | None:
        """By the clock of the device."""
        if not (begin.query() and end.query()):
            return None
        return float(begin.elapsed_time(end)) / 1e3

    def mark(self, behind: Event = None) -> Event:
        """Point 2 of [Note: stream order]."""
        current = self._queues.current()
        if behind is not None:
            current.wait_event(behind)
        return self._queues.record(current)

    def download(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Event:
        """Point 4 of [Note: stream order]."""
        self._gradients.wait_event(self.mark())
        begin = self._queues.record(self._gradients)
        with self._queues.use(self._gradients):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        done = self._queues.record(self._gradients)
        self.last_download = begin, done
        return done

    def finish(self, event: Event) -> None:
        """Block the host."""
        event.synchronize()

    def enter_thread(self) -> None:
        """Make this device the thread's own, for as long as the thread lives."""
        # A fresh thread's device is number 0, and whoever restores it makes a context there: torch
        # does where it records or frees an event. A ``with`` would end with this function.
        self._queues.enter()

    def host_buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        """As the kind of device locks it."""
        return self._pins.buffer(nbytes, pinned=pinned)

    def pin(self, tensor: Tensor) -> None:
        """Lock it, with this device as the current one."""
        with self._queues.use(self._copies):
            self._pins.lock(tensor)

    def unpin(self, tensor: Tensor) -> None:
        """Give the memory back."""
        with self._queues.use(self._copies):
            self._pins.unlock(tensor)

    def free_bytes(self) -> int | None:
        """As the driver reports it, cached blocks of torch's allocator included."""
        free, _ = torch.get_device_module(self.device).mem_get_info(self.device)
        reserved = torch.accelerator.memory_reserved(self.device)
        return int(free) + reserved - torch.accelerator.memory_allocated(self.device)

    def synchronize(self) -> None:
        """Block the host until the device is idle."""
        self._queues.synchronise()


def accelerator(device: torch.device, kind: type[Accelerator] = Accelerator) -> Accelerator:
    """The backend of torch's accelerator, as a class or as one that is made of it."""
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    device = torch.device(device.type, index)
    queues = TorchQueues(device)
    if device.type != "cuda":
        return kind(device, queues, Handed())
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return kind(device, queues, Registered(runtime, device, queues.synchronise))


def choose(device: torch.device | str | None) -> Backend:
    """The backend of a device; torch's accelerator if there is one and none is named.

    Raises:
        OffloadError: a device that copies cannot be ordered on.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    # MPS computes in the host's memory, where there is nothing to stream to.
    default = "cpu" if found is None or found.type == "mps" else found.type
    chosen = torch.device(device or default)
    if chosen.type == "cpu":
        return Immediate(chosen)
    if chosen.type == "mps":
        raise OffloadError(
            "Invalid device='mps'. Its memory is the host's, and torch has no streams for it to"
            " order copies by. Train the model there without stream()."
        )
    if found is None or chosen.type != found.type:
        raise OffloadError(
            f"Invalid device={str(chosen)!r}. Must be 'cpu', or torch's accelerator, which is"
            f" {found.type if found else 'none'} here (cuda, which is ROCm's name too, xpu, npu)."
        )
    return accelerator(chosen)
