"""What to stream, how far ahead, and where the masters live. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_layerlr import fields

AUTO = "auto"
BLOCK, LAYER = "block", "layer"
MEMORY, FILE = "memory", "file"
HOST_DTYPES = ("float8_e4m3fn", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPolicy:
    """Settings of one streamed model.

    Raises:
        ConfigError: a value outside its range, or two that exclude each other.
    """

    mode: str = BLOCK
    """``block``: the blocks of the model's stacks. ``layer``: single modules with large weights
    (smaller slots, more transfers)."""
    prefetch_window: int = 1
    """Units fetched ahead, >= 1. The device holds prefetch_window + 2 units."""
    pinned_pool_mb: int | None = None
    """Most page-locked host memory, MiB. None: all masters are pinned. When masters exceed it they
    stay pageable and pass through pinned staging buffers."""
    resident_blocks: int | str = 0
    """Units that stay on the device, evenly spaced; ``auto``: as many as half of the free device
    memory holds."""
    stream_trainable: bool | str = AUTO
    """Whether trainable weights are streamed and stepped on the CPU. ``auto``: all but adapters,
    which stay on the device."""
    host: str = MEMORY
    """Where frozen masters live: ``memory``, or ``file``: the safetensors files themselves,
    mapped."""
    host_dtype: str | None = None
    """Format of frozen masters in host memory: ``float8_e4m3fn`` or ``int8``, one scale per row.
    None: as they are."""
    min_numel: int = 65_536
    """Smaller parameters stay on the device; elements, >= 1."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _CHECKS[field.name](field.name, getattr(self, field.name))
        if self.host == FILE and self.host_dtype is not None:
            raise fields.invalid(
                "host_dtype",
                self.host_dtype,
                f"None with host={FILE!r}, which streams the file as it is",
            )

    @property
    def slots(self) -> int:
        """Units that the device holds at a time: the current one, the window, the one before."""
        return self.prefetch_window + 2


def _or(word: object, check: fields.Check) -> fields.Check:
    """Accept one special value, else ask ``check``."""

    def either(path: str, value: object) -> Any:
        # Compared only as a string: an array would compare element by element.
        if value is word or (isinstance(value, str) and value == word):
            return value
        return check(path, value)

    return either


def _words(*allowed: str) -> fields.Check:
    return fields.one_of(lambda: allowed)


_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "mode": _words(BLOCK, LAYER),
    "prefetch_window": fields.integer(1),
    "pinned_pool_mb": _or(None, fields.integer(1)),
    "resident_blocks": _or(AUTO, fields.integer(0)),
    "stream_trainable": _or(AUTO, fields.boolean),
    "host": _words(MEMORY, FILE),
    "host_dtype": _or(None, _words(*HOST_DTYPES)),
    "min_numel": fields.integer(1),
}
