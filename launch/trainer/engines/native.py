"""torch's own sharders: one process, DDP, FSDP1, FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
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
from dist_layerlr.checkpoint import Restored, Saving
from dist_layerlr.offload import Handle, Prediction, StreamPolicy, stream
from dist_layerlr.optim import scale_lrs
from dist_layerlr.plan import Plan
from dist_layerlr.proof import Proof, put_in_force
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import materialize, sharder_of
from launch.trainer.engines.offload import Stagehand, hold_in_bf16
from launch.trainer.engines.sharding import Sharding
from launch.trainer.engines.wrap import blocks_of, replicate
from launch.trainer.optimizers import make_optimizer, make_optimizers
from launch.trainer.options import RunOptions, TrainOptions
from launch.trainer.runtime import Runtime
from launch.trainer.weights import hold_in_16_bits, load_base


class NativeEngine:
    """A wrapped model and a torch optimizer that is attached to it."""

    def __init__(
        self,
        sharding: Sharding,
        model: nn.Module,
        plan: Plan,
        options: RunOptions,
        runtime: Runtime,
    ):
        assert sharding.wrap is not None
        self.optimizer: Any
        self.plan, self._clip, self._sharding = plan, options.train.grad_clip, sharding
        self._handle: Handle | None = None
        self._device = runtime.device
        if options.stream is not None and sharding.stagehand is Stagehand.STREAMS:
            self._stream(model, options, options.stream, runtime)
            return
        if not sharding.one_dtype:
            alike(lambda: hold_in_16_bits(model, options))
        self.model = sharding.wrap(model, plan, options, runtime)
        # Weights go into shards that exist, so no rank ever holds the whole model.
        load_base(self.model, options)
        self.model.train()
        # Last: the optimizer must hold the tensors that the sharder left behind.
        self.optimizer = attach(plan, self.model, make_optimizers(options.optimizer, options.plan))

    def _stream(
        self, model: nn.Module, options: RunOptions, policy: StreamPolicy, runtime: Runtime
    ) -> None:
        """Load to the host, attach, stream, and only then let DDP see what is left on the device.

        DDP broadcasts and buckets every parameter that it sees, and streamed ones have no storage
        on the device outside their block's forward and backward.
        """
        if options.train.dtype == "bf16":
            hold_in_bf16(blocks_of(model, self.plan))
        materialize(model, torch.device("cpu"))
        load_base(model, options)
        model.train()
        # Groups, not segments: the optimizer steps streamed parameters on the host, one by one.
        self.optimizer = attach(
            self.plan,
            model,
            lambda groups: make_optimizer(groups, options.optimizer),
            emission="groups",
        )
        self._handle = alike(
            lambda: stream(
                model,
                policy,
                optimizer=self.optimizer,
                device=runtime.device,
                files=options.model_path,
            )
        )
        self.model = model
        if not self._sharding.alone:
            self._handle.exclude_from_ddp()
            self.model = replicate(model, runtime)

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        """Skip the gradient reduction of all but the last micro step."""
        return self._sharding.micro_step(self.model, last)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        torch.autograd.backward(loss)

    def begin(self, factor: float, step: int) -> None:
        """Put the rates of optimizer step ``step`` in force, before its backward passes."""
        scale_lrs(self.optimizer, factor, step)

    def step(self, factor: float, *, observed: dict[str, float] | None = None) -> float:
        """Clip, step at plan x ``factor``, clear gradients."""
        # A bound of infinity only measures the norm.
        norm = clip_grad_norm(self.model, self._clip or float("inf"))
        scale_lrs(self.optimizer, factor)
        # Around the step alone: clipping and the schedule are done before weights are compared.
        with observe(self.plan, self.model, self.optimizer, factor, observed):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def rest(self) -> None:
        """Move weights and optimizer states to the host, between steps, where gradients are none.

        Shards of FSDP2 stay: its communication holds on to them. Streamed weights are on the host.
        """
        self._move(torch.device("cpu"))

    def wake(self) -> None:
        """Move back what ``rest`` has moved."""
        self._move(self._device)

    def _move(self, device: torch.device) -> None:
        if self._handle is not None or sharder_of(self.model).layout.shards:
            return
        # Through .data and in place: DDP and the optimizer go on holding the same tensors. Buffers
        # stay, since DDP remembers which they were.
        for param in self.model.parameters():
            if param.device != device:
                param.data = param.data.to(device)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.device != device:
                    state[key] = value.to(device)

    def steer(self, plan: Plan, factor: float) -> None:
        """Step at the rates of another plan from now on. Collective."""
        put_in_force(plan, self.model, self.optimizer, factor=factor)
        self.plan = plan
        if self._handle is not None:
            self._handle.accept_groups()

    def prove(self, factor: float, steps: int) -> Proof:
        """Verify the live learning rates on all ranks, and values after ``steps`` steps."""
        return verify(self.plan, self.model, self.optimizer, factor=factor, deep=True, steps=steps)

    def predict(self, tokens: int, micro_steps: int, options: RunOptions) -> Prediction | None:
        """Predict from the speeds of this machine, which take a second to measure."""
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
        return save_checkpoint(
            root, self.plan, self.model, self.optimizer, step=step, extra=extra, **kept(train)
        )

    def load(self, path: Path) -> Restored:
        """Continue from a checkpoint."""
        return load_checkpoint(path, self.plan, self.model, self.optimizer, factor=1.0)


def kept(train: TrainOptions) -> dict[str, Any]:
    """Return how ``save_checkpoint`` keeps checkpoints, as the training config wants it."""
    return {"keep": train.keep, "background": train.background_save}


@contextmanager
def observe(
    plan: Plan, model: nn.Module, optimizer: Any, factor: float, observed: dict[str, float] | None
) -> Iterator[None]:
    """Compare what the step inside really does with the plan, and fill ``observed`` with it.

    With ``observed`` None nothing is compared.
    """
    if observed is None:
        yield
        return
    with effect_check(plan, model, optimizer, factor=factor) as rates:
        yield
    observed.update(rates)
