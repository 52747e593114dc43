"""What the step and checkpoint benchmarks share: ranks, a toy transformer, torch's sharders."""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block with 21 parameter tensors, named as diffusers names them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v", "to_out")}
        )
        self.attn2 = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=False) for name in ("to_q", "to_k", "to_v")}
        )
        self.ff = nn.ModuleDict(
            {"linear_in": nn.Linear(width, 2 * width), "linear_out": nn.Linear(2 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        for attention, norm in ((self.attn1, self.norm1), (self.attn2, self.norm2)):
            h = norm(x)
            y = nn.functional.scaled_dot_product_attention(
                attention["to_q"](h), attention["to_k"](h), attention["to_v"](h)
            )
            x = x + (attention["to_out"](y) if "to_out" in attention else y)
        inner = nn.functional.gelu(self.ff["linear_in"](self.norm3(x)))
        out: Tensor = self.ff["linear_out"](inner)
        return x + out


class Model(nn.Module):
    """A stack of blocks under the name that diffusers gives it."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        for block in self.transformer_blocks:
            x = block(x)
        return x


def start_rank(rank: int, store: str, ranks: int) -> None:
    """Make this process one of the gloo ranks that meet at the file ``store``."""
    # One thread per rank: the ranks share few cores.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Without this DeepSpeed builds its shared-memory collectives at the first process group.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def wrap(sharder: str, model: nn.Module, ranks: int) -> nn.Module:
    """Shard a model block by block, as a user would: `ddp`, `fsdp1`, `fsdp1_flat` or `fsdp2`."""
    if sharder == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if sharder == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (ranks,))
        for module in model.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    units = _units_of_fsdp1(model, flat=sharder == "fsdp1_flat")
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: id(module) in units),
        use_orig_params=sharder == "fsdp1",
        device_id=torch.device("cpu"),
    )


def _units_of_fsdp1(model: nn.Module, *, flat: bool) -> set[int]:
    """Ids of the modules that FSDP1 wraps: blocks, and adapters where they must stand alone."""
    units = {id(module) for module in model.modules() if isinstance(module, Block)}
    if flat and not all(p.requires_grad for p in model.parameters()):
        # One flat parameter is either trained or frozen, so each adapter becomes its own unit.
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                units.add(id(module))
    return units
