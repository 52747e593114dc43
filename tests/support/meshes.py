"""One small model placed on device meshes in every way that torch knows, and trained unsharded.

All ranks see the same batch, so that every layout must end where one process ends. Everything is
float64: what differs by more than 1e-9 is wrong, not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # noqa: F401  before the fork: DTensors import it, which takes seconds
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dist_layerlr import attach, clip_grad_norm, plan_model

TOKENS, WIDTH, HIDDEN, EXPERTS = 4, 12, 16, 4
EXACT = 1e-9
CLIP, DECAY = 0.05, 0.1
CONFIG = {
    "learning_rate": 1e-2,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"ffn": 2e-2, "norm": 5e-3},
        "default_lr": 1e-2,
        "unmatched": "default",
        "no_decay": ["ndim<=1"],
    },
}
Place = Callable[["Net"], Any]


class Experts(nn.Module):
    """One matrix for each expert, all of them used by every token."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, dtype=torch.float64) / 5)

    def forward(self, x: Tensor) -> Tensor:
        w: Any = self.w
        return torch.einsum("...i,eij->...j", x, w.full_tensor() if isinstance(w, DTensor) else w)


class Block(nn.Module):
    """A norm, two projections that tensor parallelism cuts in both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Projections that are cut, plain ones beside them, experts, a frozen layer and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.emb = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.gather = nn.Identity()  # where sequence parallelism puts the tokens together again
        self.experts = Experts()
        self.still = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 3)
        self.register_buffer("seen", torch.full((2,), float(seed)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        x = self.gather(x)
        return self.head(self.still(x + 0.1 * self.experts(x)))


def mesh(*shape: int, names: str = "dp tp") -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names.split())[-len(shape) :])


def cut(net: Net, on: DeviceMesh) -> None:
    """Tensor parallelism: rows of one projection, columns of the other."""
    for block in net.blocks:
        parallelize_module(block, on, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def cut_sequence(net: Net, on: DeviceMesh) -> None:
    """Sequence parallelism: norms on a part of the tokens; their gradients are addends."""
    for block in net.blocks:
        parallelize_module(
            block,
            on,
            {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
            },
        )
    whole = PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
    )
    parallelize_module(net, on, {"emb": ColwiseParallel(output_layouts=Shard(1)), "gather": whole})


def shard(net: Net, on: DeviceMesh, **more: Any) -> Net:
    for block in net.blocks:
        fully_shard(block, mesh=on, **more)
    return fully_shard(net, mesh=on, **more)  # type: ignore[return-value]


def fsdp2(net: Net) -> Net:
    return shard(net, mesh(dist.get_world_size()))


def tensor_parallel(net: Net) -> Net:
    cut(net, mesh(dist.get_world_size()))
    return net


def sequence_parallel(net: Net) -> Net:
    cut_sequence(net, mesh(dist.get_world_size()))
    return net


def fsdp2_and_tensor_parallel(net: Net) -> Net:
    on = mesh(2, 2)
    cut(net, on["tp"])
    return shard(net, on["dp"])


def fsdp2_and_sequence_parallel(net: Net) -> Net:
    on = mesh(2, 2)
    cut_sequence(net, on["tp"])
    return shard(net, on["dp"])


def hybrid(net: Net) -> Net:
    return shard(net, mesh(2, 2))


def hybrid_and_tensor_parallel(net: Net) -> Net:
    on = mesh(2, 2, 2, names="replicate dp tp")
    cut(net, on["tp"])
    return shard(net, on["replicate", "dp"])


def last_dimension(net: Net) -> Net:
    def along(param: Tensor) -> Shard:
        last = param.ndim - 1
        return Shard(last if param.shape[last] % dist.get_world_size() == 0 else 0)

    return shard(net, mesh(dist.get_world_size()), shard_placement_fn=along)


def experts_apart(net: Net) -> Net:
    """Experts on a mesh of their own: half of them on each of its columns, each half sharded."""
    on = mesh(2, 2, names="dp ep")
    parallel = distribute_tensor(net.experts.w.data, on["ep"], [Shard(0)])
    net.experts.w = nn.Parameter(parallel)
    fully_shard(net.experts, mesh=on["dp"])
    return shard(net, mesh(dist.get_world_size()))


def ignored(net: Net) -> Net:
    whole = {net.experts.w, net.head.weight}
    return shard(net, mesh(dist.get_world_size()), ignored_params=whole)


def two_meshes(net: Net) -> Net:
    """Each half of the ranks shards a model of its own; both see the same batches."""
    return shard(net, mesh(2, 2, names="copy dp")["dp"])


def replicated(net: Net) -> Any:
    return replicate(net)


LAYOUTS: dict[str, Place] = {
    "plain": lambda net: net,
    "fsdp2": fsdp2,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "fsdp2 x tensor parallel": fsdp2_and_tensor_parallel,
    "fsdp2 x sequence parallel": fsdp2_and_sequence_parallel,
    "hybrid": hybrid,
    "last dimension": last_dimension,
    "experts on a second mesh": experts_apart,
    "ignored parameters": ignored,
    "two meshes": two_meshes,
    "replicate": replicated,
}


class Trained:
    """A placed model, its plan and optimizer."""

    def __init__(self, place: Place, *, emission: str = "auto", seed: int = 0):
        net = Net(seed)
        self.plan = plan_model(net, CONFIG)
        self.model = place(net)
        self.optimizer = attach(self.plan, self.model, adamw, emission=emission)

    def step(self, number: int) -> None:
        self.backward(number)
        clip_grad_norm(self.model, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, number: int) -> None:
        loss(self.model, number).backward()  # type: ignore[no-untyped-call]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=DECAY, eps=1e-3)


def loss(model: nn.Module, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + number)
    x = torch.randn(2, TOKENS, 5, generator=generator, dtype=torch.float64)
    y = torch.randn(2, TOKENS, 3, generator=generator, dtype=torch.float64)
    return F.mse_loss(model(x), y)


def unsharded(steps: int, seed: int = 0) -> dict[str, Tensor]:
    """State after so many steps of torch's own AdamW in one process, one group for each name."""
    net = Net(seed)
    groups = []
    for name, entry in plan_model(net, CONFIG).entries.items():
        decay = DECAY if entry.weight_decay is None else entry.weight_decay
        groups.append({"params": [net.get_parameter(name)], "lr": entry.lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, eps=1e-3)
    for number in range(steps):
        optimizer.zero_grad()
        loss(net, number).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], CLIP)
        optimizer.step()
    return {name: value.detach().clone() for name, value in net.state_dict().items()}
