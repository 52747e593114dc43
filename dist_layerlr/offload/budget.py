"""What the sizes in a policy mean for the units at hand: residents, and page-locked host memory."""

from __future__ import annotations

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend
from dist_layerlr.offload.grad_memory import STAGING, group_capacity
from dist_layerlr.offload.masters import payload_bytes, slot_bytes
from dist_layerlr.offload.policy import AUTO, StreamPolicy
from dist_layerlr.offload.stats import UnitInfo
from dist_layerlr.offload.units import UnitSpec

MEBIBYTE = 2**20
_AUTO_SHARE = 0.5
"""Part of the free device memory that ``resident_blocks='auto'`` fills.

Activations need the rest."""

_TRAINED_BESIDES = 3
"""Copies of a trained weight that lie beside it: its gradient, and Adam's two moments."""


def unit_info(spec: UnitSpec, policy: StreamPolicy, *, resident: bool) -> UnitInfo:
    """Sizes of one unit under a policy."""
    return UnitInfo(
        name=spec.name,
        numel=spec.numel,
        streamed=0 if resident else sum(w.param.numel() for w in spec.weights),
        host_bytes=payload_bytes(spec, policy.host_dtype),
        device_bytes=slot_bytes(spec),
        grad_bytes=sum(w.param.nbytes for w in spec.trainable),
        resident=resident,
    )


def resident_count(specs: list[UnitSpec], policy: StreamPolicy, backend: Backend) -> int:
    """Number of units that stay on the device; at least one is streamed."""
    wanted = policy.resident_blocks
    if wanted == AUTO:
        # The slots take their part of the share, too.
        free, slots = backend.free_bytes(), policy.slots * max(map(slot_bytes, specs))
        kept = max(map(_kept_bytes, specs))
        wanted = 0 if free is None else (int(_AUTO_SHARE * free) - slots) // kept
    return max(0, min(int(wanted), len(specs) - 1))


def _kept_bytes(spec: UnitSpec) -> int:
    """Device memory of a resident unit: its weights, and what training them takes besides."""
    trained = sum(weight.param.nbytes for weight in spec.trainable)
    return slot_bytes(spec) + _TRAINED_BESIDES * trained


def grad_staging_bytes(specs: list[UnitSpec]) -> int:
    """Bytes of the pinned buffers that gradients pass through where pinned memory is limited."""
    sizes = [[weight.param.nbytes for weight in spec.trainable] for spec in specs]
    return STAGING * group_capacity(sizes)


def master_pool_bytes(policy: StreamPolicy, specs: list[UnitSpec]) -> int | None:
    """Bytes that may be pinned for masters or their staging; None: no limit."""
    if policy.pinned_pool_mb is None:
        return None
    return policy.pinned_pool_mb * MEBIBYTE - grad_staging_bytes(specs)


def check_pool(policy: StreamPolicy, specs: list[UnitSpec]) -> None:
    """Refuse a pool that no unit fits through.

    Raises:
        OffloadError: ``pinned_pool_mb`` is too small; the message says how large it must be.
    """
    pool = master_pool_bytes(policy, specs)
    largest = max(specs, key=lambda spec: payload_bytes(spec, policy.host_dtype))
    needed = payload_bytes(largest, policy.host_dtype)
    if pool is not None and pool < needed:
        least = -(-(needed + grad_staging_bytes(specs)) // MEBIBYTE)  # rounded up to whole MiB
        raise OffloadError(
            f"Invalid pinned_pool_mb={policy.pinned_pool_mb}: smaller than what one unit"
            f" ({largest.name}) passes through. Must be >= {least}."
        )
