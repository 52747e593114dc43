"""torch's own: one process, DDP, FSDP1, FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr import attach, clip_grad_norm, effect_check, load_checkpoint, save_checkpoint, scale_lrs, verify
from dist_layerlr.checkpoint.load import Restored
from dist_layerlr.checkpoint.save import Saving
from dist_layerlr.plan import Plan
from dist_layerlr.proof import Proof

from ..options import OptimizerOptions, RunOptions, TrainOptions
from ..runtime import Runtime
from ..weights import load_base
from .wrap import WRAPS


class NativeEngine:
    """A wrapped model and a torch optimizer that is attached to it."""

    def __init__(self, sharding: str, model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime):
        self._plan, self._clip, self._sharding = plan, options.train.grad_clip, sharding
        self.model = WRAPS[sharding](model, plan, options, runtime)
        load_base(self.model, options)
        self.model.train()
        self.optimizer = attach(plan, self.model, lambda groups: make_optimizer(groups, options.optimizer))

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Skip the gradient reduction of all but the last micro step."""
        model: Any = self.model
        if self._sharding in ("ddp", "fsdp1", "fsdp1_flat") and not last:
            return model.no_sync()  # type: ignore[no-any-return]
        if self._sharding in ("fsdp2", "hsdp"):
            model.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        torch.autograd.backward(loss)

    def step(self, factor: float, *, observed: dict[str, float] | None = None) -> float:
        """Clip, step at plan x ``factor``, clear gradients."""
        norm: float = clip_grad_norm(self.model, self._clip or float("inf"))
        scale_lrs(self.optimizer, factor)
        with observe(self._plan, self.model, self.optimizer, factor, observed):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def prove(self, factor: float) -> Proof:
        """Verify the live learning rates on all ranks."""
        proof: Proof = verify(self._plan, self.model, self.optimizer, factor=factor)
        return proof

    def save(self, root: Path, step: int, extra: Mapping[str, Any], train: TrainOptions) -> Saving:
        """Write a checkpoint."""
        return save(self._plan, self.model, self.optimizer, root, step, extra, train)

    def load(self, path: Path) -> Restored:
        """Continue from a checkpoint."""
        restored: Restored = load_checkpoint(path, self._plan, self.model, self.optimizer, factor=1.0)
        return restored


def save(
    plan: Plan, model: nn.Module, optimizer: Any, root: Path, step: int, extra: Mapping[str, Any], train: TrainOptions
) -> Saving:
    """Write a checkpoint as the training config wants it."""
    saving: Saving = save_checkpoint(
        root, plan, model, optimizer, step=step, extra=extra, keep=train.keep, background=train.background_save
    )
    return saving


@contextmanager
def observe(
    plan: Plan, model: nn.Module, optimizer: Any, factor: float, observed: dict[str, float] | None
) -> Iterator[None]:
    """Check what the step inside really does, and report it in ``observed``; None: do not look."""
    if observed is None:
        yield
        return
    with effect_check(plan, model, optimizer, factor=factor) as rates:
        yield
    observed.update(rates)


def make_optimizer(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Build the optimizer that the config names on the plan's groups."""
    if options.kind == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=options.momentum, weight_decay=options.weight_decay)
    settings: dict[str, Any] = {"betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
    # One pass over memory on CPU and CUDA alike: see benchmarks/step_cost.py.
    return torch.optim.AdamW(groups, lr=0.0, fused=True, **settings)
