"""The device: memory, copies, and what waits for what.

One implementation for CUDA, one where copies are immediate.

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
   the slot is taken.
3. Copies into one slot need no event between them: the copy stream keeps their order.
4. Gradients: the gradient stream waits for the compute stream before each copy; the gradient is
   kept alive until the host has seen its event, so that the allocator cannot hand out its memory.
5. The ring is allocated once, on the compute stream, and never freed while streaming: nothing to
   record with the allocator, and a bound on how far the host can run ahead.
6. *masters*: the caller may write to them when he has them back. So the host waits for the last
   copy that reads them: behind a forward without gradients, behind a backward, and before an
   optimizer steps. (Behind a forward with gradients it does not: backward follows.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_layerlr.errors import OffloadError

PAGE = 4096
"""Bytes of a page of host memory; page-locking works on whole pages."""
Event = Any
"""A point in a queue."""


class Backend(Protocol):
    """A device and its queues."""

    device: torch.device

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

    def wait(self, ready: Event) -> bool:
        """Make compute wait for a copy. Returns whether it had to."""
        ...

    def mark(self) -> Event:
        """Where compute is now."""
        ...

    def download(self, target: Tensor, source: Tensor) -> Event:
        """Copy to the host behind all compute so far."""
        ...

    def finish(self, event: Event) -> None:
        """Make the host wait."""
        ...

    def pin(self, tensor: Tensor) -> None:
        """Page-lock host memory in place."""
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

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def upload(
        self, target: Tensor, source: Tensor, after: Event, then: Callable[[], None] | None
    ) -> Event:
        """Copy now."""
        target.copy_(source)
        if then is not None:
            then()

    def wait(self, ready: Event) -> bool:
        """Nothing to wait for."""
        return False

    def mark(self) -> Event:
        """One queue, so any point will do."""
        return True

    def download(self, target: Tensor, source: Tensor) -> Event:
        """Copy now."""
        target.copy_(source)

    def finish(self, event: Event) -> None:
        """Nothing to wait for."""

    def pin(self, tensor: Tensor) -> None:
        """Nothing to lock."""

    def unpin(self, tensor: Tensor) -> None:
        """Nothing to lock."""

    def free_bytes(self) -> int | None:
        """None: the host's own memory."""
        return None

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Cuda:
    """A CUDA device. The order of its queues: see [Note: stream order]."""

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._copies: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pins: dict[int, weakref.finalize[Any, Any]] = {}
        self._gradients: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory of the compute stream: point 5 of [Note: stream order]."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def upload(
        self, target: Tensor, source: Tensor, after: Event, then: Callable[[], None] | None
    ) -> Event:
        """Points 1 to 3 of [Note: stream order]."""
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            if then is not None:
                then()
            return self._copies.record_event()

    def wait(self, ready: Event) -> bool:
        """Point 1 of [Note: stream order]."""
        late = not ready.query()
        if late:
            torch.cuda.current_stream(self.device).wait_event(ready)
        return late

    def mark(self) -> Event:
        """Point 2 of [Note: stream order]."""
        return torch.cuda.current_stream(self.device).record_event()

    def download(self, target: Tensor, source: Tensor) -> Event:
        """Point 4 of [Note: stream order]."""
        self._gradients.wait_event(self.mark())
        with torch.cuda.stream(self._gradients):
            target.copy_(source, non_blocking=True)
            return self._gradients.record_event()

    def finish(self, event: Event) -> None:
        """Block the host."""
        event.synchronize()

    def pin(self, tensor: Tensor) -> None:
        """Register the exact range; ``pin_memory`` would round it up to a power of two.

        Raises:
            OffloadError: the system does not lock that much.
        """
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(status) != 0:
            raise OffloadError(
                f"Cannot page-lock {tensor.nbytes / 2**20:.0f} MiB of host memory ({status}). Set"
                " pinned_pool_mb lower (masters then stay pageable), or raise the limit (ulimit"
                " -l)."
            )
        # Also where the model is dropped without remove(): a page must not stay locked when its
        # memory is reused.
        self._pins[tensor.data_ptr()] = weakref.finalize(
            tensor, runtime.cudaHostUnregister, tensor.data_ptr()
        )

    def unpin(self, tensor: Tensor) -> None:
        """Give the range back."""
        self._pins.pop(tensor.data_ptr())()

    def free_bytes(self) -> int | None:
        """As the driver reports it, cached blocks of torch's allocator included."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + cached

    def synchronize(self) -> None:
        """Block the host until the device is idle."""
        torch.cuda.synchronize(self.device)


def host_buffer(nbytes: int) -> Tensor:
    """Host bytes on pages of their own, so that locking them locks nothing else."""
    # torch aligns to 64 bytes. With two pages more the bytes can start at a page, and the rest of
    # their last page belongs to them, too.
    memory = torch.empty(nbytes + 2 * PAGE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % PAGE
    return memory[start : start + nbytes]


def choose(device: torch.device | str | None) -> Backend:
    """The backend of a device; cuda if there is one and none is named.

    Raises:
        OffloadError: a device that copies cannot be ordered on.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        return Cuda(chosen)
    if chosen.type == "cpu":
        return Immediate(chosen)
    raise OffloadError(f"Invalid device={str(chosen)!r}. Must be 'cuda' (or 'cuda:N'), or 'cpu'.")
