"""Memory in bytes of living tensors. Unlike the size of a process, it does not depend on the
machine, on the allocator, or on what else runs.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN = (torch.Tensor, nn.Parameter)
"""Wrappers such as DTensor own no memory; what they wrap is a plain tensor, and is found too."""


def living_bytes() -> int:
    """Bytes of the storages that tensors on the CPU hold, except inside `only_new_tensors` those
    that were there before.
    """
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in PLAIN and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def only_new_tensors() -> Iterator[None]:
    """Within, `living_bytes` sees only what is made after this: the collector lists no frozen
    object, which also makes the count many times faster.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class MostLiving(TorchDispatchMode):
    """Remembers the most bytes that lived after any operation of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, living_bytes())
        return result
