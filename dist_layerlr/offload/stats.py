"""What a handle tells about itself. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitInfo:
    """One unit of the model as it is streamed."""

    name: str
    """Dotted path of its module."""
    numel: int
    """Elements of all its parameters, adapters and small ones included."""
    streamed: int
    """Elements that are streamed; 0 for a resident unit."""
    host_bytes: int
    """Bytes of one fetch, host to device; of a resident unit, if it were streamed."""
    device_bytes: int
    """Bytes of a slot that it fills, or of the device memory that it keeps if resident."""
    grad_bytes: int
    """Bytes of the gradients that one backward sends back; 0 when what is streamed is frozen. Of a
    resident unit, if it were streamed."""
    resident: bool
    """Whether it stays on the device (``resident_blocks``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What crossed the link."""

    h2d_bytes: int = 0
    d2h_bytes: int = 0
    fetches: int = 0
    """Units copied to the device."""
    stalls: int = 0
    """Copies that compute waited for, by the device's clock; those that are done, so that a read
    behind a synchronisation is complete."""
    stall_s: float = 0.0
    """Seconds that compute waited for them."""
    h2d_s: float = 0.0
    """Seconds that copies to the device took, those that are done."""
    d2h_s: float = 0.0
    """Seconds that copies of gradients to the host took."""

    @property
    def h2d_gb_s(self) -> float:
        """Speed of the link to the device, in 1e9 bytes per second; 0 without a copy."""
        return self.h2d_bytes / self.h2d_s / 1e9 if self.h2d_s else 0.0

    @property
    def d2h_gb_s(self) -> float:
        """Speed of the link to the host, in 1e9 bytes per second; 0 without a copy."""
        return self.d2h_bytes / self.d2h_s / 1e9 if self.d2h_s else 0.0

    @property
    def overlap(self) -> float:
        """Share of the time of copies to the device that compute did not wait; 1 without a copy."""
        return max(0.0, 1.0 - self.stall_s / self.h2d_s) if self.h2d_s else 1.0

    def since(self, before: Traffic) -> Traffic:
        """The difference."""
        earlier = asdict(before)
        return Traffic(**{key: value - earlier[key] for key, value in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters of a handle."""

    total: Traffic
    """Since ``stream``."""
    recent: Traffic
    """Since the last call of ``stats``."""
    resident_peak: int
    """Most units that held a slot at a time."""
    slots: int
    """Slots that there are."""
