"""Torch's own sharders and DeepSpeed, each driven the same way: micro steps, step, whole
weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch._dynamo  # noqa: F401  before the fork, as DeepSpeed's parts: imports take longer than most cases
import torch.distributed as dist
from deepspeed.ops.op_builder import all_ops  # noqa: F401
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.fp16 import unfused_optimizer  # noqa: F401
from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.cpp_extension import get_default_build_root

from dist_layerlr import attach, bind, clip_grad_norm, plan_model
from dist_layerlr.optim import check_ds_config
from dist_layerlr.plan import canonical_name
from dist_layerlr.sharders.model import unwrap
from tests.support.parity import GLOBAL_BATCH, Recipe, Weights
from tests.support.toys import Frozen, TwoNormBlock

torch.compile(nn.Identity())  # imports inductor, as DeepSpeed does inside each initialize
bf16_optimizer.see_memory_usage = lambda *_, **__: None  # collects garbage for every group
Wrap = Callable[[Any], Any]


def fsdp1(
    model: nn.Module, *, flat: bool = False, strategy: str = "FULL_SHARD", **more: Any
) -> FSDP:
    return FSDP(
        model,
        use_orig_params=not flat,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=more.pop("policy", ModuleWrapPolicy({TwoNormBlock, Frozen})),
        device_id=torch.device("cpu"),
        **more,
    )


def fsdp2(model: Any, mesh: tuple[int, ...] | None = None, **more: Any) -> Any:
    shape = mesh or (dist.get_world_size(),)
    device_mesh = init_device_mesh(
        "cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]
    )
    for block in next(m for n, m in model.named_modules() if n.rpartition(".")[2] == "blocks"):
        fully_shard(block, mesh=device_mesh, **more)
    return fully_shard(model, mesh=device_mesh, **more)


def fsdp1_flat(model: nn.Module, **more: Any) -> FSDP:
    return fsdp1(model, flat=True, **more)


SHARDERS: dict[str, Wrap] = {"ddp": DDP, "fsdp1": fsdp1, "fsdp1_flat": fsdp1_flat, "fsdp2": fsdp2}


class Native:
    """A model under torch's own sharders."""

    def __init__(self, wrap: Wrap, recipe: Recipe):
        model = recipe.model()
        self.plan = plan_model(model, recipe.config)
        self.model = wrap(model)
        self.optimizer = attach(self.plan, self.model, recipe.make, emission=recipe.emission)
        self.scheduler = (
            LambdaLR(self.optimizer, recipe.factor) if recipe.schedule == "lambda" else None
        )
        self._recipe = recipe

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        if hasattr(self.model, "no_sync"):
            return nullcontext() if last else self.model.no_sync()
        if hasattr(self.model, "set_requires_gradient_sync"):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._recipe.accumulate).backward()

    def step(self) -> None:
        if self._recipe.clip is not None:
            assert clip_grad_norm(self.model, self._recipe.clip) > self._recipe.clip
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()

    def full(self) -> Weights:
        inner = unwrap(self.model)
        whole = (
            FSDP.summon_full_params(inner, writeback=False)
            if isinstance(inner, FSDP)
            else nullcontext()
        )
        with whole:
            return {
                canonical_name(n): (p.full_tensor() if hasattr(p, "full_tensor") else p)
                .detach()
                .clone()
                for n, p in inner.named_parameters()
            }


def start_deepspeed() -> None:
    """DeepSpeed on the ranks' process group, without compiling its shared memory op."""
    import deepspeed

    size = os.environ["WORLD_SIZE"]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=size)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", verbose=False)


def need_cpu_adam() -> None:
    """Skip, saying so, where DeepSpeedCPUAdam would first be compiled."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    if not any(Path(root).glob("**/cpu_adam.so")):
        pytest.skip("DeepSpeedCPUAdam is not compiled here (its first use takes minutes)")


def ds_config(stage: int, recipe: Recipe, **fields: Any) -> dict[str, Any]:
    """A config that changes no arithmetic; ``zero`` holds more of its zero_optimization block."""
    ranks = torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // ranks // recipe.accumulate,
        "gradient_accumulation_steps": recipe.accumulate,
        "zero_optimization": {"stage": stage, **fields.pop("zero", {})},
        "gradient_clipping": recipe.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **fields,
    }
    check_ds_config(config)
    return config


class Zero:
    """A model in a DeepSpeed engine."""

    optimizer = None

    def __init__(
        self,
        recipe: Recipe,
        stage: int,
        *,
        zero_init: bool = False,
        compiled: bool = False,
        **fields: Any,
    ):
        config = ds_config(stage, recipe, **fields)
        with deepspeed.zero.Init(config_dict_or_path=config) if zero_init else nullcontext():
            model: Any = recipe.model()
        if compiled:
            model.blocks[0].compile(backend="eager")
        self.plan = plan_model(model, recipe.config)
        optimizer = attach(self.plan, model, recipe.make, emission=recipe.emission)
        self.scheduler = LambdaLR(optimizer, recipe.factor) if recipe.schedule == "lambda" else None
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=self.scheduler, config=config
        )
        if recipe.emission == "segmented":
            bind(self.plan, self.model)
        if "bf16" in fields:
            self.model.module.register_forward_pre_hook(
                lambda _, inputs: tuple(x.bfloat16() for x in inputs)
            )

    def micro_step(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """And step: the engine counts micro steps, and steps at the last one."""
        self.model.backward(loss)
        self.model.step()

    def step(self) -> None:
        pass

    def full(self) -> Weights:
        return {canonical_name(n): whole(p) for n, p in self.model.module.named_parameters()}


def whole(param: Any) -> torch.Tensor:
    """The fp32 master weight, or the weight where there is none."""
    master = safe_get_full_fp32_param(param) if param.requires_grad else None
    if master is not None:
        return master.detach().clone().float()
    with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
        return param.detach().clone().float()
