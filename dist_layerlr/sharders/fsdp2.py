"""FSDP2 (``fully_shard``): parameters are replaced by DTensors under unchanged names.

An optimizer built before sharding holds the old tensors and trains nothing, silently; identity is
what is checked here. Shards may lie along any dimension, beside tensor or expert parallelism, and
on meshes of some ranks only.
"""

from __future__ import annotations

from dist_layerlr.sharders.base import Layout
from dist_layerlr.sharders.dtensor import DTensorSharder
from dist_layerlr.sharders.model import Kinds


class Fsdp2Sharder(DTensorSharder):
    """DTensors that units gather and reshard.

    HSDP replicates them over the mesh's other dimension.
    """

    @classmethod
    def handles(cls, kinds: Kinds) -> bool:
        """Whether any module is an ``FSDPModule``."""
        from torch.distributed.fsdp import FSDPModule

        return any(issubclass(kind, FSDPModule) for kind in kinds.modules)

    def _read_layout(self) -> Layout:
        return Layout(name="fsdp2", shards=True, meshes=True)

    def refresh(self) -> None:
        """Drop what is gathered, if anything is: the next forward gathers it anew."""
        self.reshard()

    def reshard(self) -> None:
        """Put the sharded parameters back into their modules.

        A unit swaps gathered, plain parameters in for its DTensors until it reshards. After a
        forward without a backward (an evaluation) the root, or with ``reshard_after_forward`` as a
        number every unit, is still gathered: its modules then show tensors that nobody trains.
        """
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # costs nothing where the unit is sharded already
