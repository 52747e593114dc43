"""What a step needs is made while the step before is still at work, by threads of this process.

Threads, not processes: files are read and pictures are decoded outside Python's lock, nothing is
pickled, and no process is forked that holds a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key")
Made = TypeVar("Made")
AHEAD = 2
"""Things that wait for each thread: one in work and one to go on with."""


class Prefetch(Generic[Key, Made]):
    """Makes things in threads, in the order in which they will be asked for."""

    def __init__(
        self,
        make: Callable[[Key], Made],
        keys: Iterator[Key],
        workers: int,
        device: torch.device,
    ) -> None:
        """Begin with the first keys.

        Args:
            make: Called in a thread; it must depend on its key alone.
            keys: What will be asked for, in this order.
            workers: Threads; 0: everything is made when it is asked for.
            device: Of this rank.
        """
        self._make, self._keys, self._most = make, keys, AHEAD * workers
        self._waiting: deque[tuple[Key, Future[Made]]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        if workers > 0:
            self._threads = ThreadPoolExecutor(workers, "data", _on(device))
        self._fill()

    def get(self, key: Key) -> Made:
        """Return what belongs to a key, waiting for it if need be.

        Raises:
            Exception: whatever ``make`` raised for this key.
        """
        if not self._waiting or self._waiting[0][0] != key:
            return self._make(key)
        _, future = self._waiting.popleft()
        # First the wait: a thread that has failed must not be given more to do.
        made = future.result()
        self._fill()
        return made

    def close(self) -> None:
        """End the threads, after what they have in work."""
        self._waiting.clear()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while self._threads is not None and len(self._waiting) < self._most:
            key = next(self._keys, None)
            if key is None:
                return
            self._waiting.append((key, self._threads.submit(self._make, key)))


def _on(device: torch.device) -> Callable[[], None]:
    """Return what a thread does first: pinning memory makes a context on the thread's device."""

    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)

    return begin


def pinned(value: Any, device: torch.device) -> Any:
    """Return a batch in memory from which a device copies without anybody waiting.

    It is the batch itself where the device is none of CUDA.
    """
    if device.type != "cuda":
        return value
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {key: pinned(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pinned(item, device) for item in value]
    return value
