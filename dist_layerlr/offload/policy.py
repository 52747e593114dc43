"""What to stream, how far ahead, and where the masters live. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dist_layerlr.fields import boolean, check_all, either, integer, invalid, one_of, setting

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

    mode: str = setting(
        one_of(lambda: (BLOCK, LAYER)),
        default=BLOCK,
        doc="`block`: the blocks of the model's stacks. `layer`: single modules with large weights"
        " (smaller slots, more transfers).",
    )
    prefetch_window: int = setting(
        integer(1),
        default=1,
        unit="units",
        doc="Units fetched ahead. The device holds prefetch_window + 2 units.",
    )
    pinned_pool_mb: int | None = setting(
        either(None, integer(1)),
        default=None,
        unit="MiB",
        shown="none: all masters are pinned",
        doc="Most page-locked host memory. When masters exceed it they stay pageable and pass"
        " through pinned staging buffers.",
    )
    resident_blocks: int | str = setting(
        either(AUTO, integer(0)),
        default=0,
        unit="units",
        doc="Units that stay on the device, evenly spaced; `auto`: as many as half of the free"
        " device memory holds.",
    )
    stream_trainable: bool | str = setting(
        either(AUTO, boolean),
        default=AUTO,
        doc="Whether trainable weights are streamed and stepped on the CPU. `auto`: all but"
        " adapters, which stay on the device.",
    )
    host: str = setting(
        one_of(lambda: (MEMORY, FILE)),
        default=MEMORY,
        doc="Where frozen masters live: `memory`, or `file`: the safetensors files themselves,"
        " mapped.",
    )
    host_dtype: str | None = setting(
        either(None, one_of(lambda: HOST_DTYPES)),
        default=None,
        shown="none: as they are",
        doc="Format of frozen masters in host memory, with one scale per row.",
    )
    min_numel: int = setting(
        integer(1),
        default=65_536,
        unit="elements",
        doc="Smaller parameters stay on the device.",
    )

    def __post_init__(self) -> None:
        """Check each value, then those that exclude each other."""
        check_all(self)
        if self.host == FILE and self.host_dtype is not None:
            raise invalid(
                "host_dtype",
                self.host_dtype,
                f"None with host={FILE!r}, which streams the file as it is",
            )

    @property
    def slots(self) -> int:
        """Units that the device holds at a time: the current one, the window, the one before."""
        return self.prefetch_window + 2
