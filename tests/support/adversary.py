"""A device that is as late, and as early, as the order of its queues allows.

Copies to the device run when somebody waits for them, in order; the target is poisoned when they
are asked for. Copies to the host run when the host waits for them. A copy into memory that compute
still uses is a violation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_layerlr.offload.internals import storage_key
from dist_layerlr.offload.pinning import host_buffer

POISON = 255
"""As the bytes of any float: NaN."""


class _Copy:
    def __init__(self, run: Callable[[], None]):
        self.run, self.done = run, False


class Adversary:
    """A backend for `cpu` or `sim`. Release it to free what it allocated."""

    def __init__(self, device: str):
        self.device = torch.device(device, None if device == "cpu" else 0)
        self.uploaded = self.downloaded = 0
        self.last_upload = self.last_download = None
        self.locked: list[tuple[int, int]] = []
        """(address, bytes) of pinned memory."""
        self.most_locked = 0
        self.violations: list[str] = []
        """Copies into memory that compute was not done with."""
        self._memory: dict[int, Tensor] = {}
        """{storage: what was allocated}; a pending copy holds no view of it, as a real one does
        not."""
        self._queue: list[_Copy] = []
        self._lock = threading.RLock()
        self._clock: Any = None
        if device == "sim":
            from tests.support import sim_device

            self._clock = sim_device.Clock

    def allocate(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8).fill_(POISON).to(self.device)
        self._memory[storage_key(memory)] = memory
        return memory

    def upload(
        self, target: Tensor, source: Tensor, after: Any, then: Callable[[], None] | None
    ) -> _Copy:
        self._must_be_free(target, after)
        self.uploaded += source.nbytes

        memory, size = self._memory[storage_key(target)], target.numel()

        def run() -> None:
            memory[:size].copy_(source)
            if then is not None:
                then()

        with self._lock:
            self._off_the_clock(lambda: target.fill_(POISON))
            self._queue.append(_Copy(run))
            return self._queue[-1]

    def now(self) -> float:
        return 0.0

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait(self, ready: _Copy) -> bool | None:
        late = not ready.done
        self.finish(ready)
        return late or None

    def waited(self, reached: Any, ready: _Copy) -> float:
        return 1.0

    def enter_thread(self) -> None:
        pass

    def host_buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        return host_buffer(nbytes)

    def mark(self, behind: int | None = None) -> int:
        return 0 if self._clock is None else self._clock.now

    def download(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> _Copy:
        for target, source in zip(targets, sources, strict=True):
            self.downloaded += source.nbytes
            target.fill_(float("nan"))

        def run() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

        return _Copy(run)

    def finish(self, event: _Copy) -> None:
        with self._lock:
            while event in self._queue:
                self._complete(self._queue.pop(0))
            self._complete(event)

    def pin(self, tensor: Tensor) -> None:
        self.locked.append((tensor.data_ptr(), tensor.nbytes))
        self.most_locked = max(self.most_locked, sum(size for _, size in self.locked))

    def unpin(self, tensor: Tensor) -> None:
        self.locked.remove((tensor.data_ptr(), tensor.nbytes))

    def free_bytes(self) -> int | None:
        return None

    def synchronize(self) -> None:
        """The end of streaming."""
        with self._lock:
            while self._queue:
                self._complete(self._queue.pop(0))
            self._memory.clear()

    def _complete(self, copy: _Copy) -> None:
        if not copy.done:
            copy.done = True
            self._off_the_clock(copy.run)
            copy.run = lambda: None

    def _off_the_clock(self, run: Callable[[], Any]) -> None:
        """Copy queues are not compute."""
        if self._clock is None:
            run()
            return
        before, self._clock.paused = self._clock.paused, True
        try:
            run()
        finally:
            self._clock.paused = before

    def _must_be_free(self, target: Tensor, after: Any) -> None:
        if self._clock is None or after is None:
            return
        last = self._clock.touched.get(storage_key(target), 0)
        if after < last:
            self.violations.append(
                f"slot overwritten behind point {after} of compute, which used it at {last}"
            )
