"""``stream`` and what it returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from torch.optim import Optimizer

from dist_layerlr.offload.policy import StreamPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitInfo:
    """One unit of the model as it is streamed, in forward order."""

    name: str
    """Dotted path of its module."""
    numel: int
    """Elements of all its parameters, adapters and small ones included."""
    streamed: int
    """Elements that are streamed; 0 for a resident unit."""
    host_bytes: int
    """Bytes of one fetch, host to device."""
    device_bytes: int
    """Bytes of one slot that it fills."""
    grad_bytes: int
    """Bytes of the gradients that one backward sends back; 0 when what is streamed is frozen."""
    resident: bool
    """Whether it stays on the device (``resident_blocks``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What crossed the link."""

    h2d_bytes: int
    d2h_bytes: int
    fetches: int
    """Units copied to the device."""
    stalls: int
    """Units that were needed before their copy had finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters of a handle."""

    total: Traffic
    """Since ``stream``."""
    recent: Traffic
    """Since the last call of ``stats``."""
    resident_peak: int
    """Most units that held a slot at a time."""


class Handle:
    """A streamed model. Use it as a context manager, or call ``remove``."""

    policy: StreamPolicy
    units: tuple[UnitInfo, ...]
    """In forward order; layer mode: in the order of the first forward, once that has run."""
    device: torch.device

    def stats(self) -> Stats:
        """Read the counters."""
        raise NotImplementedError

    def streamed_names(self) -> tuple[str, ...]:
        """Names, as in ``model.named_parameters()``, of streamed parameters."""
        raise NotImplementedError

    def remove(self) -> None:
        """Give the model back as it was: plain tensors on their first device, no hooks. Idempotent."""
        raise NotImplementedError

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def stream(
    model: nn.Module,
    policy: StreamPolicy,
    *,
    optimizer: Optimizer | None = None,
    device: torch.device | str | None = None,
    files: str | Path | Iterable[str | Path] | None = None,
) -> Handle:
    """Stream ``model``'s units through a fixed ring of device slots.

    Args:
        model: unsharded, before DDP wraps it; adapters injected, ``requires_grad`` set, weights loaded.
        policy: what to stream.
        optimizer: when given, its groups are checked at every forward, and its state follows parameters that move.
        device: where compute happens; default: cuda if there is one, else cpu.
        files: checkpoint folder or safetensors files, for ``host="file"``.

    Raises:
        OffloadError: the model cannot be streamed; it is unchanged.
    """
    raise NotImplementedError


def exclude_from_ddp(handle: Handle, model: nn.Module) -> None:
    """Tell a later ``DistributedDataParallel(model)`` to leave streamed frozen parameters alone."""
    raise NotImplementedError
