"""torch's own: one process, DDP, FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr import param_groups, scale_lrs, verify
from dist_layerlr.model import unwrap
from dist_layerlr.plan import Plan
from dist_layerlr.proof import Proof

from ..options import OptimizerOptions, RunOptions
from ..runtime import Runtime
from ..weights import full_tensors, load_weights


class NativeEngine:
    """Plain parameter groups on the live parameters, stepped by a torch optimizer."""

    def __init__(
        self, sharding: str, model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime, files: dict[str, Path]
    ):
        self._plan, self._clip = plan, options.train.grad_clip
        if sharding == "fsdp2":
            _shard(model, plan, runtime)
        load_weights(model, files, seed=options.train.seed, device=runtime.device)
        model.train()
        self.model = _data_parallel(model, runtime) if sharding == "ddp" else model
        self.optimizer = make_optimizer(param_groups(plan, self.model), options.optimizer)
        self._sharding = sharding

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Skip the gradient reduction of all but the last micro step."""
        if self._sharding == "ddp" and not last:
            return self.model.no_sync()  # type: ignore[operator,no-any-return]
        if self._sharding == "fsdp2":
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self, factor: float) -> float:
        """Clip, step at plan x ``factor``, clear gradients."""
        limit = self._clip or float("inf")
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.clip_grad_norm_(trained, limit)
        scale_lrs(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def prove(self, factor: float) -> Proof:
        """Verify the live learning rates on all ranks."""
        return verify(self._plan, self.model, self.optimizer, factor=factor)

    def trained_tensors(self, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """Gather shards, one tensor at a time."""
        return full_tensors(unwrap(self.model), keep=keep)


def make_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Build the optimizer that the config names on the plan's groups."""
    if options.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, weight_decay=options.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay)


def _shard(model: nn.Module, plan: Plan, runtime: Runtime) -> None:
    """``fully_shard`` every block of the plan's stacks, then the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The loop never writes into an output in place, which is what this warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    for block in _blocks(model, plan):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """The modules that the plan calls blocks, in order."""
    stacks = dict.fromkeys(e.stack for e in plan.entries.values() if e.stack is not None)
    blocks: list[nn.Module] = []
    for stack in stacks:
        container = model.get_submodule(stack)
        blocks += list(container.children()) if isinstance(container, (nn.ModuleList, nn.Sequential)) else [container]
    return blocks


def _data_parallel(model: nn.Module, runtime: Runtime) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    ids = [runtime.local_rank] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)
