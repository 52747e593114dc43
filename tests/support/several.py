"""Muon for the matrices and AdamW for the rest, under every sharder, and by hand in one process.

The reference shares nothing with the plan: who takes a name, its rate and the parts of a fused
matrix are written out here, and torch's own two optimizers step whole parameters.

Muon orthogonalises in bf16. Where a gradient has a lower rank than its matrix, which it has with
few samples, rounding fills the rest, and Newton-Schulz makes it as large as the gradient: one bit
of a gradient then moves weights by a whole rate, in torch's own Muon too. So all runs here see
gradients that are equal bit by bit: two halves of a batch are added, to which further ranks add
zeros, and AdamW rounds alike wherever its slices begin (not fused).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_layerlr import attach, bind, plan_model
from dist_layerlr.plan import Plan
from tests.support.families import wan
from tests.support.naive_deepspeed import ds_config, masters, start
from tests.support.naive_torch import whole
from tests.support.toys import HIDDEN, WIDTH

STEPS, BATCH, BLOCKS = 10, 8, 6
BAR = 1e-5
"""Largest difference of any weight after all steps, fp32."""
LR, DECAY, TIMES = 1e-3, 0.1, 3.0
HALVES = (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))
Weights = dict[str, Tensor]


class FusedProjections(nn.Module):
    """Query, key and value in one matrix of an odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.tanh(q) * torch.sigmoid(k) + v)


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = FusedProjections()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    """Six blocks of prime sizes, an embedding, a head, and one number of which most ranks hold
    nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Linear(7, WIDTH)
        self.gate = nn.Parameter(torch.full((1,), 0.3))
        self.blocks = nn.ModuleList([FusedBlock() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.gate)


CONFIG = {
    "learning_rate": LR,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"ffn": 2 * LR},
        "default_lr": LR,
        "depth_strategy": "flat",
        "unmatched": "default",
    },
    "optimizers": {"muon": {"lr_multiplier": TIMES}, "adamw": "rest"},
}


def muon(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(groups, lr=1.0, weight_decay=DECAY)


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1.0, weight_decay=DECAY, foreach=False)


MAKES: Mapping[str, Any] = {"muon": muon, "adamw": adamw}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A model and its batches."""

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int, slice], Tensor]
    """(model, step, samples) -> loss."""
    blocks: tuple[type[nn.Module], ...]
    config: Mapping[str, Any]
    is_muon: Callable[[str, Tensor], bool]
    rate: Callable[[str], float]
    parts: Callable[[str], int]
    """Equal parts of a fused matrix."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def lora_net() -> nn.Module:
    """Adapters on attention; the feed-forwards train whole beside them."""
    model = net()
    settings = LoraConfig(r=3, lora_alpha=6, target_modules=["proj"], init_lora_weights=False)
    inject_adapter_in_model(settings, model)
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name or ".mlp." in name)
    return model


def net_loss(model: nn.Module, step: int, samples: slice) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 3, generator=generator)
    return F.mse_loss(model(x[samples]), y[samples])


def _in_matrix(name: str, param: Tensor) -> bool:
    inside = ".attn." in name or ".mlp." in name
    return inside and param.ndim == 2 and "lora_" not in name


def _rate(name: str) -> float:
    return 2 * LR if ".mlp." in name else LR


NET = Case(
    model=net,
    loss=net_loss,
    blocks=(FusedBlock,),
    config=CONFIG,
    is_muon=_in_matrix,
    rate=_rate,
    parts=lambda name: 3 if ".qkv." in name else 1,
)
LORA = Case(
    model=lora_net,
    loss=net_loss,
    blocks=(FusedBlock,),
    config=CONFIG,
    is_muon=_in_matrix,
    rate=_rate,
    parts=lambda name: 1,
)


def unchanged(name: str, step: int) -> float:
    return 1.0


def reference(
    case: Case, steps: int = STEPS, times: Callable[[str, int], float] = unchanged
) -> Weights:
    """Weights of one process: torch.optim.Muon on each matrix, torch.optim.AdamW on the rest.

    A fused matrix is cut into parameters of its own for each step, which share its memory.

    Args:
        case: What is trained.
        steps: How long.
        times: (name, step) -> what its rate is multiplied by in that step.
    """
    model = case.model()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    cut: dict[str, list[nn.Parameter]] = {}
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, param in named.items():
        if not case.is_muon(name, param):
            others.append({"params": [param], "lr": case.rate(name), "name": name})
            continue
        cut[name] = [nn.Parameter(part) for part in param.detach().chunk(case.parts(name))]
        rate = TIMES * case.rate(name)
        matrices.append({"params": cut[name], "lr": rate, "name": name})
    optimizers = [adamw(others), *([muon(matrices)] if matrices else [])]
    planned = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(steps):
        for half in HALVES:
            (0.5 * case.loss(model, step, half)).backward()
        for name, parts in cut.items():
            gradient = named[name].grad
            assert gradient is not None
            for part, slope in zip(parts, gradient.chunk(len(parts)), strict=True):
                part.grad = slope
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, lr in zip(groups, planned, strict=True):
            group["lr"] = lr * times(group["name"], step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return {name: param.detach().clone() for name, param in named.items()}


reference_of = functools.cache(reference)


def still_text_wan() -> nn.Module:
    """Wan, of whose text embedder gradients are exact zeros: sharders add those of the blocks up in
    orders of their own."""
    model: Any = wan()
    model.condition_embedder.text_embedder.register_forward_hook(
        lambda module, args, out: out.detach() + 0.0 * out
    )
    return model


def wan_loss(model: nn.Module, step: int, samples: slice) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    noise, wanted = (torch.randn(BATCH, 4, 1, 4, 4, generator=generator) for _ in range(2))
    prompt = torch.randn(BATCH, 3, 16, generator=generator)
    (found,) = model(
        hidden_states=noise[samples],
        timestep=torch.full((BATCH // 2,), 500 + step),
        encoder_hidden_states=prompt[samples],
        return_dict=False,
    )
    return F.mse_loss(found, wanted[samples])


def _in_wan_matrix(name: str, param: Tensor) -> bool:
    inside = name.startswith("blocks.") and (".attn" in name or ".ffn." in name)
    return inside and param.ndim == 2


WAN = Case(
    model=still_text_wan,
    loss=wan_loss,
    blocks=(WanTransformerBlock,),
    config=CONFIG,
    is_muon=_in_wan_matrix,
    rate=lambda name: 2 * LR if ".ffn." in name else LR,
    parts=lambda name: 1,
)


def fsdp1(model: nn.Module, case: Case, *, flat: bool) -> Any:
    return FSDP(
        model,
        use_orig_params=not flat,
        auto_wrap_policy=ModuleWrapPolicy(set(case.blocks)),
        device_id=torch.device("cpu"),
    )


def fsdp2(model: nn.Module, case: Case, shape: tuple[int, ...]) -> Any:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in model.modules():
        if isinstance(module, case.blocks):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _hsdp(model: nn.Module, case: Case) -> Any:
    ranks = dist.get_world_size()
    return fsdp2(model, case, (2, ranks // 2))


WRAPS: Mapping[str, Callable[[nn.Module, Case], Any]] = {
    "none": lambda model, case: model,
    "ddp": lambda model, case: DDP(model),
    "fsdp1": functools.partial(fsdp1, flat=False),
    "fsdp1_flat": functools.partial(fsdp1, flat=True),
    "fsdp2": lambda model, case: fsdp2(model, case, (dist.get_world_size(),)),
    "hsdp": _hsdp,
}
LAYOUTS = (*WRAPS, "zero 0", "zero 1", "zero 2", "zero 3")


class Run:
    """A case under one layout, stepped as its users do."""

    def __init__(self, case: Case, layout: str, makes: Any = MAKES, config: Any = None):
        self.case, self.layout = case, layout
        model = case.model()
        self.plan: Plan = plan_model(model, config or case.config)
        self.optimizer: Any = None
        self.model: Any
        if layout.startswith("zero"):
            stage = int(layout[-1])
            settings = ds_config(stage, {"sub_group_size": 4000} if stage == 3 else None)
            settings["train_micro_batch_size_per_gpu"] = BATCH // 2
            optimizer = attach(self.plan, model, makes, emission="segmented")
            self.model = start(model, optimizer, settings)
            bind(self.plan, self.model)
        else:
            self.model = WRAPS[layout](model, case)
            self.optimizer = attach(self.plan, self.model, makes)

    def step(self, step: int) -> None:
        self.backward(step)
        self.update()

    def backward(self, step: int) -> None:
        if self.layout == "none":
            for half in HALVES:
                (0.5 * self.case.loss(self.model, step, half)).backward()
            return
        rank, ranks = dist.get_rank(), dist.get_world_size()
        # The sharder takes the mean over all ranks; powers of two are exact in any order.
        share = ranks / 2 if rank < 2 else 0.0
        loss = share * self.case.loss(self.model, step, HALVES[rank % 2])
        if self.optimizer is None:
            self.model.backward(loss)
        else:
            loss.backward()

    def update(self) -> None:
        if self.optimizer is None:
            self.model.step()
        else:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def train(self, steps: int = STEPS, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.step(step)

    def weights(self) -> Weights:
        found = masters(self.model) if self.optimizer is None else whole(self.model)
        return {plain(name): value for name, value in found.items() if plain(name) in self.names}

    @functools.cached_property
    def names(self) -> set[str]:
        return set(self.plan.entries)


def plain(name: str) -> str:
    return name.removeprefix("module.")


def distance(a: Weights, b: Weights) -> float:
    """Largest difference of any element of any name."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
