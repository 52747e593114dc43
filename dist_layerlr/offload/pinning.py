"""Host memory that a device may copy from and to by itself: page-locked, by the kind of device.

CUDA and ROCm lock memory in place, to the byte. Other runtimes hand out locked memory themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_layerlr.errors import OffloadError

_WIPEONFORK, _KEEPONFORK = 18, 19
"""Linux's MADV_WIPEONFORK and MADV_KEEPONFORK."""


class Pins(Protocol):
    """The page-locked memory of one device."""

    def buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        """Host bytes; with ``pinned``, ``lock`` will be called for them."""
        ...

    def lock(self, tensor: Tensor) -> None:
        """Page-lock a buffer."""
        ...

    def unlock(self, tensor: Tensor) -> None:
        """Undo ``lock``; no copy uses the buffer any more."""
        ...


class Registered:
    """Memory that the CUDA (or HIP) runtime locks in place."""

    def __init__(self, runtime: Any, device: torch.device, settle: Callable[[], None]):
        """Lock nothing yet.

        Args:
            runtime: with cudaHostRegister and cudaHostUnregister, as ``torch.cuda.cudart()``.
            device: whose copies use the memory.
            settle: makes the host wait for all of them.
        """
        self._runtime, self._device, self._settle = runtime, device, settle
        self._locks: dict[int, weakref.finalize[Any, Any]] = {}

    def buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        """A mapping of its own."""
        return host_buffer(nbytes)

    def lock(self, tensor: Tensor) -> None:
        """Register the exact range; ``pin_memory`` would round it up to a power of two.

        Raises:
            OffloadError: the system does not lock that much.
        """
        # Locked pages are copied into every forked child at once, where the system does not share
        # them: each worker of a DataLoader would take as much memory as all masters. The child gets
        # zeros; without any pages there (MADV_DONTFORK) its allocator would put others at these
        # addresses, which go when the child frees the model.
        _advise(tensor, _WIPEONFORK)
        status = self._runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        if int(status) != 0:
            _advise(tensor, _KEEPONFORK)
            self._clear_error()
            raise OffloadError(
                f"Cannot page-lock {tensor.nbytes / 2**20:.0f} MiB of host memory ({status}). Set"
                " pinned_pool_mb lower (masters then stay pageable), or give the job more memory."
            )
        # Also where the model is dropped without remove(): a page must not stay locked when its
        # memory is reused, nor be unlocked while a queued copy reads it.
        self._locks[tensor.data_ptr()] = weakref.finalize(
            tensor, _unregister, self._runtime, self._settle, tensor.data_ptr(), os.getpid()
        )

    def unlock(self, tensor: Tensor) -> None:
        """Give the range back."""
        lock = self._locks.pop(tensor.data_ptr())
        lock.detach()
        self._runtime.cudaHostUnregister(tensor.data_ptr())
        _advise(tensor, _KEEPONFORK)

    def _clear_error(self) -> None:
        # The runtime remembers the error and reports it at the next kernel, whosever that is.
        try:
            torch.empty(1, dtype=torch.uint8, device=self._device).fill_(0)
        except RuntimeError:
            pass


class Handed:
    """Memory that torch's allocator of the device hands out locked."""

    def buffer(self, nbytes: int, *, pinned: bool) -> Tensor:
        """Locked at once; it may be rounded up."""
        if not pinned:
            return host_buffer(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def lock(self, tensor: Tensor) -> None:
        """It is."""

    def unlock(self, tensor: Tensor) -> None:
        """It goes with the tensor."""


def host_buffer(nbytes: int) -> Tensor:
    """Host bytes on pages of their own, so that locking them locks nothing else."""
    # A private mapping: a forked child sees its own copy, and no allocator reuses a part of it.
    pages = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The tensor keeps the mapping alive.
    return torch.frombuffer(pages, dtype=torch.uint8, count=max(1, nbytes))[:nbytes]


def _unregister(runtime: Any, settle: Callable[[], None], address: int, process: int) -> None:
    # A forked child locked nothing, and has no runtime that could wait.
    if os.getpid() != process:
        return
    settle()
    runtime.cudaHostUnregister(address)


def _advise(tensor: Tensor, advice: int) -> None:
    """Tell the system about the pages of a buffer; they are its own."""
    if sys.platform != "linux":  # others do not fork, or do not lock
        return
    libc = ctypes.CDLL(None, use_errno=True)
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    if libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size), advice) != 0:
        code = ctypes.get_errno()
        raise OffloadError(
            f"The system refuses madvise({advice}) on {tensor.nbytes} bytes of host memory (errno"
            f" {code}): use host='file', or pinned_pool_mb for less pinned memory."
        )
