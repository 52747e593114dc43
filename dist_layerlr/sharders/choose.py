"""Which sharder wraps a model: the model itself is asked, never a flag."""

from __future__ import annotations

from torch import nn

from dist_layerlr.sharders.base import Sharder
from dist_layerlr.sharders.dtensor import DTensorSharder
from dist_layerlr.sharders.fsdp1 import Fsdp1Sharder
from dist_layerlr.sharders.fsdp2 import Fsdp2Sharder
from dist_layerlr.sharders.model import Kinds
from dist_layerlr.sharders.plain import PlainSharder
from dist_layerlr.sharders.zero import ZeroSharder

# The order matters: a DeepSpeed engine or DDP may hold modules of another sharder, FSDP2's
# parameters are DTensors, and the plain sharder takes all.
_SHARDERS: tuple[type[Sharder], ...] = (
    ZeroSharder,
    Fsdp2Sharder,
    Fsdp1Sharder,
    DTensorSharder,
    PlainSharder,
)


def sharder_of(model: nn.Module) -> Sharder:
    """The sharder of a model as it is wrapped now, bound to that model."""
    kinds = Kinds.of(model)
    return next(sharder(model) for sharder in _SHARDERS if sharder.handles(kinds))
