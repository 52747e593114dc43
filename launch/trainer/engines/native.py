"""torch's own: one process, DDP, FSDP1, FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr import (
    attach,
    clip_grad_norm,
    effect_check,
    load_checkpoint,
    save_checkpoint,
    verify,
)
from dist_layerlr.checkpoint.load import Restored
from dist_layerlr.checkpoint.save import Saving
from dist_layerlr.offload import Handle, Prediction, StreamPolicy, stream
from dist_layerlr.optim import scale_lrs
from dist_layerlr.plan.entries import Plan
from dist_layerlr.proof.verify import Proof
from dist_layerlr.sharders import materialize
from launch.trainer.engines.offload import STREAMED, hold_in_bf16
from launch.trainer.engines.sharding import WRAPS, blocks_of, replicate
from launch.trainer.options import OptimizerOptions, RunOptions, TrainOptions
from launch.trainer.runtime import Runtime
from launch.trainer.weights import load_base


class NativeEngine:
    """A wrapped model and a torch optimizer that is attached to it."""

    def __init__(
        self, sharding: str, model: nn.Module, plan: Plan, options: RunOptions, runtime: Runtime
    ):
        self._plan, self._clip, self._sharding = plan, options.train.grad_clip, sharding
        self._handle: Handle | None = None
        if options.stream is not None and sharding in STREAMED:
            self._stream(model, options, options.stream, runtime)
            return
        self.model = WRAPS[sharding](model, plan, options, runtime)
        load_base(self.model, options)
        self.model.train()
        self.optimizer = attach(
            plan, self.model, lambda groups: make_optimizer(groups, options.optimizer)
        )

    def _stream(
        self, model: nn.Module, options: RunOptions, policy: StreamPolicy, runtime: Runtime
    ) -> None:
        """Load to the host, attach, stream, and only then let DDP see what is left on the
        device.
        """
        if options.train.dtype == "bf16":
            hold_in_bf16(blocks_of(model, self._plan))
        materialize(model, torch.device("cpu"))
        load_base(model, options)
        model.train()
        self.optimizer = attach(
            self._plan,
            model,
            lambda groups: make_optimizer(groups, options.optimizer),
            emission="groups",
        )
        self._handle = runtime.agree(
            lambda: stream(
                model,
                policy,
                optimizer=self.optimizer,
                device=runtime.device,
                files=options.model_path,
            )
        )
        if self._sharding == "ddp":
            self._handle.exclude_from_ddp()
        self.model = replicate(model, runtime) if self._sharding == "ddp" else model

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

    def predict(self, tokens: int, micro_steps: int, options: RunOptions) -> Prediction | None:
        """From the speeds of this machine, which take a second to measure."""
        if self._handle is None:
            return None
        dtype = torch.bfloat16 if options.train.dtype == "bf16" else None
        return self._handle.predict(
            tokens, checkpointing=options.train.checkpointing, micro_steps=micro_steps, dtype=dtype
        )

    def traffic(self) -> dict[str, int]:
        """What crossed the link since the last call, and the most units that held a slot so far."""
        if self._handle is None:
            return {}
        stats = self._handle.stats()
        return {**asdict(stats.recent), "units_in_slots": stats.resident_peak}

    def save(self, root: Path, step: int, extra: Mapping[str, Any], train: TrainOptions) -> Saving:
        """Write a checkpoint."""
        return save(self._plan, self.model, self.optimizer, root, step, extra, train)

    def load(self, path: Path) -> Restored:
        """Continue from a checkpoint."""
        restored: Restored = load_checkpoint(
            path, self._plan, self.model, self.optimizer, factor=1.0
        )
        return restored


def save(
    plan: Plan,
    model: nn.Module,
    optimizer: Any,
    root: Path,
    step: int,
    extra: Mapping[str, Any],
    train: TrainOptions,
) -> Saving:
    """Write a checkpoint as the training config wants it."""
    saving: Saving = save_checkpoint(
        root,
        plan,
        model,
        optimizer,
        step=step,
        extra=extra,
        keep=train.keep,
        background=train.background_save,
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


def make_optimizer(
    groups: list[dict[str, Any]], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """Build the optimizer that the config names on the plan's groups."""
    if options.kind == "sgd":
        return torch.optim.SGD(
            groups, lr=0.0, momentum=options.momentum, weight_decay=options.weight_decay
        )
    settings: dict[str, Any] = {
        "betas": options.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }
    # One pass over memory on CPU and CUDA alike: see benchmarks/step_cost.py.
    return torch.optim.AdamW(groups, lr=0.0, fused=True, **settings)
