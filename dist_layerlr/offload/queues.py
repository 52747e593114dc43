"""The queues of a device, in six calls: all that streaming asks of a device's runtime.

torch's generic streams serve CUDA, ROCm, XPU and NPU alike. A test brings queues of its own, and so
runs the same backend under a race detector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a queue. ``torch.Event`` is one."""

    def query(self) -> bool:
        """Whether the device has passed it, as far as the host knows."""
        ...

    def synchronize(self) -> None:
        """Make the host wait until the device has passed it."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this point to a later one, both passed; negative if it was earlier."""
        ...


class Queue(Protocol):
    """Work that the device does in order. ``torch.Stream`` is one."""

    def wait_event(self, event: Any) -> None:
        """What is queued from now on begins behind that point."""
        ...


class Queues(Protocol):
    """A device's runtime."""

    def new(self) -> Queue:
        """Make a queue."""
        ...

    def current(self) -> Queue:
        """The queue that this thread computes on."""
        ...

    def use(self, queue: Queue) -> AbstractContextManager[None]:
        """Have this thread queue its work there, and on this device."""
        ...

    def enter(self) -> None:
        """Make the device this thread's own, for as long as the thread lives."""
        ...

    def record(self, queue: Queue) -> Event:
        """The point behind all that was queued there so far."""
        ...

    def synchronise(self) -> None:
        """Make the host wait for all queues."""
        ...


class TorchQueues:
    """Queues of ``torch.Stream`` and ``torch.Event``, of any accelerator that torch drives."""

    def __init__(self, device: torch.device):
        self._device = device

    def new(self) -> Queue:
        """A stream of the device."""
        return torch.Stream(self._device)

    def current(self) -> Queue:
        """The device's current stream."""
        return torch.accelerator.current_stream(self._device)

    @contextmanager
    def use(self, queue: Any) -> Iterator[None]:
        """Set the current stream, and the device around it, which set_stream would leave set."""
        # Not ``with stream:``, which keeps what it replaced on the stream object: two threads that
        # enter one stream would restore each other's.
        with torch.accelerator.device_index(self._device.index):
            before = torch.accelerator.current_stream(self._device)
            torch.accelerator.set_stream(queue)
            try:
                yield
            finally:
                torch.accelerator.set_stream(before)

    def enter(self) -> None:
        """Set the current device."""
        torch.accelerator.set_device_index(self._device.index)

    def record(self, queue: Any) -> Event:
        """A timed event."""
        event = torch.Event(self._device, enable_timing=True)
        event.record(queue)
        return event

    def synchronise(self) -> None:
        """All streams of the device."""
        torch.accelerator.synchronize(self._device)
