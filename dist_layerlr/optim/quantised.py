"""Optimizers with state in 8 bits or fewer: what sharding makes of them is said once."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch.optim import Optimizer

from dist_layerlr.optim.routed import parts_of
from dist_layerlr.ranks import rank
from dist_layerlr.sharders import Layout

# AdamW8bit, PagedAdamW8bit, AdamW4bit, AdamWFp8 of bitsandbytes and torchao, and their subclasses.
_QUANTISED = re.compile(r"[48]bit|fp8", re.IGNORECASE)
_told: set[str] = set()


def tell_of_quantised(optimizer: Any, layout: Layout) -> None:
    """Warn, once for a class and on rank 0, that shard size decides who gets quantised state.

    These optimizers keep tensors below a size (4,096 elements) in 32 bits, and quantise the others
    block by block from their first element on. Both depend on where a shard begins and ends.
    """
    if not layout.shards or rank() != 0:
        return
    routed = parts_of(optimizer)
    inner = getattr(optimizer, "inner", optimizer)
    for part in routed.parts.values() if routed is not None else (inner,):
        kind = quantises(part)
        if kind is not None and kind not in _told:
            _told.add(kind)
            # Frame 6 is the caller of attach: ``alike``, its attempt and a lambda come between.
            warnings.warn(
                f"{kind} keeps small tensors in 32 bits and quantises others in blocks: under"
                f" {layout.label} the size of a shard decides which, so another number of ranks"
                " trains a bit differently. verify reports the precision of each name's state.",
                stacklevel=6,
            )


def quantises(optimizer: Optimizer) -> str | None:
    """Class of an optimizer whose state is quantised; None: it is not, as far as names tell."""
    for kind in type(optimizer).__mro__:
        if _QUANTISED.search(kind.__name__):
            return type(optimizer).__name__
    return None
