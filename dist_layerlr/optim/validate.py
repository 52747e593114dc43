"""Refuse, before training, schedulers, ds_configs and optimizers that would change the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.sharders import sharder_of

_WRITES_ONE_RATE = {
    "OneCycleLR": "drives every group to the same max_lr",
    "OneCycle": "drives every group to the same rates",
    "CyclicLR": "cycles every group between the same two rates",
    "LRRangeTest": "gives every group the same rate",
    "SWALR": "anneals every group to the same swa_lr",
}
_NOT_ELEMENTWISE = {
    "Adafactor": "factors its state over whole matrices, so shards train differently",
    "Lamb": "scales each update by a norm over the whole tensor",
    "LAMB": "scales each update by a norm over the whole tensor",
    "LARS": "scales each update by a norm over the whole tensor",
    "Muon": "orthogonalises whole matrices",
    "SM3": "keeps row and column statistics of whole matrices",
    "Shampoo": "preconditions whole matrices",
}
_ONE_RATE_FOR_ALL = frozenset({"Prodigy", "DAdaptAdam", "DAdaptAdaGrad", "DAdaptSGD", "DAdaptLion"})
_USE_OURS = "Use PlanSchedule(optimizer, Schedule(...)): one multiplier for all rates."


def check_scheduler(scheduler: Any) -> None:
    """Refuse a learning rate scheduler that does not keep the ratios between groups.

    Args:
        scheduler: any torch, DeepSpeed or Accelerate scheduler.

    Raises:
        ConfigError: names the scheduler and what it would do.
    """
    name = type(scheduler).__name__
    if name == "AcceleratedScheduler":
        _check_accelerated(scheduler)
        return
    if name in ("SequentialLR", "ChainedScheduler"):
        for inner in scheduler._schedulers:
            check_scheduler(inner)
        return
    if name in _WRITES_ONE_RATE:
        raise ConfigError(f"Invalid scheduler {name}: it {_WRITES_ONE_RATE[name]}. {_USE_OURS}")
    if getattr(scheduler, "eta_min", 0.0):
        raise ConfigError(
            f"Invalid scheduler {name}(eta_min={scheduler.eta_min:g}): all groups end at that one"
            f" rate. Set eta_min=0, or give the floor as a ratio. {_USE_OURS}"
        )
    if any(getattr(scheduler, "min_lrs", [])) and name == "ReduceLROnPlateau":
        raise ConfigError(
            f"Invalid scheduler {name}(min_lr={scheduler.min_lrs}): low groups stop early. Set"
            " min_lr=0."
        )
    if name in ("WarmupLR", "WarmupDecayLR"):
        _check_proportional(name, scheduler)
    if name in ("LambdaLR", "MultiplicativeLR") and len({id(f) for f in scheduler.lr_lambdas}) > 1:
        raise ConfigError(
            f"Invalid scheduler {name} with a function per group: ratios change. Give one function."
        )


def torch_scheduler(scheduler: Any) -> LRScheduler | None:
    """The torch scheduler that this is, or that Accelerate has wrapped; None: something else."""
    inner = scheduler.scheduler if type(scheduler).__name__ == "AcceleratedScheduler" else scheduler
    return inner if isinstance(inner, LRScheduler) else None


def _check_accelerated(scheduler: Any) -> None:
    """``AcceleratedScheduler`` steps once per process unless told otherwise."""
    from accelerate.state import AcceleratorState

    ranks = AcceleratorState().num_processes
    if scheduler.step_with_optimizer and not scheduler.split_batches and ranks > 1:
        raise ConfigError(
            f"Invalid scheduler {type(scheduler.scheduler).__name__} prepared by Accelerate: it is"
            f" stepped {ranks} times per optimizer step. Do not prepare it; step PlanSchedule"
            " yourself, or pass step_scheduler_with_optimizer=False."
        )
    check_scheduler(scheduler.scheduler)


def _check_proportional(name: str, scheduler: Any) -> None:
    """DeepSpeed's warmups go from min_lrs to max_lrs, lists that a scalar fills with one value."""
    targets: Sequence[float] = scheduler.max_lrs
    groups = scheduler.optimizer.param_groups
    planned = [float(g.get("initial_lr", g["lr"])) for g in groups]
    ratios = [t / p for t, p in zip(targets, planned, strict=False) if p > 0]
    if len(targets) != len(planned) or any(
        not math.isclose(r, ratios[0], rel_tol=1e-6) for r in ratios
    ):
        raise ConfigError(
            f"Invalid scheduler {name}(warmup_max_lr={list(targets)[:3]}...): it would write these"
            f" over the planned {planned[:3]}.... {_USE_OURS}"
        )


def check_ds_config(config: Mapping[str, Any]) -> None:
    """Refuse settings of a ds_config that take the learning rates over or make them unprovable.

    Raises:
        ConfigError: names the setting, what it would do, and what to write instead.
    """
    scheduler = config.get("scheduler")
    if scheduler and scheduler.get("type") != "WarmupCosineLR":
        raise ConfigError(
            f"Invalid ds_config 'scheduler' block {scheduler.get('type')!r}: it would write one"
            f" rate over every planned learning rate. Remove the block. {_USE_OURS}"
        )
    optimizer = config.get("optimizer")
    if optimizer:
        raise ConfigError(
            f"Invalid ds_config 'optimizer' block {optimizer.get('type')!r}: it is silently ignored"
            " beside a client optimizer, or replaces the planned groups. Remove the block; build"
            " the optimizer with attach()."
        )
    if "gradient_clipping" not in config:
        raise ConfigError(
            "Invalid ds_config without 'gradient_clipping': DeepSpeed's default changed to 1.0 and"
            " clips silently. State it; 0.0 means no clipping."
        )
    zero = config.get("zero_optimization", {})
    if zero.get("round_robin_gradients"):
        raise ConfigError(
            "Invalid ds_config zero_optimization.round_robin_gradients=true: DeepSpeed then reads"
            " back the wrong weights (safe_get_full_fp32_param). Remove it."
        )
    ratio = zero.get("offload_optimizer", {}).get("ratio", 1.0)
    if ratio < 1.0:
        raise ConfigError(
            f"Invalid ds_config offload_optimizer.ratio={ratio}: the part left on the device keeps"
            " a stale copy of the first group's rate. Set it to 1.0 or remove it."
        )


def check_optimizer(optimizer: Any, model: nn.Module | None = None) -> None:
    """Refuse optimizers that do not work element by element, or cannot hold several rates.

    Args:
        optimizer: a torch optimizer.
        model: as it is trained; unsharded models may use any optimizer that holds several rates.

    Raises:
        ConfigError: names the optimizer and the reason.
    """
    inner = getattr(optimizer, "inner", None) or optimizer
    name = type(inner).__name__
    layout = None if model is None else sharder_of(model).layout
    sharded = layout is None or layout.shards
    if name in _NOT_ELEMENTWISE and sharded:
        raise ConfigError(
            f"Invalid optimizer {name} on sharded parameters: it {_NOT_ELEMENTWISE[name]}. Use"
            " AdamW."
        )
    if isinstance(optimizer, Segmented) and optimizer.cuts and _is_quantised(inner):
        raise ConfigError(
            f"Invalid optimizer {name} on flat parameters: it keeps its state in quantised blocks,"
            " which names that share a flat tensor cannot share. Use it with DDP or FSDP2, or use"
            " AdamW."
        )
    if name in _ONE_RATE_FOR_ALL:
        raise ConfigError(
            f"Invalid optimizer {name}: it adapts one rate for all groups. Use AdamW, or one flat"
            " rate."
        )
    if name == "Adagrad" and (layout is None or (layout.engine_steps and layout.shards)):
        raise ConfigError(
            "Invalid optimizer Adagrad under ZeRO: DeepSpeed rebuilds it from its constructor's"
            " defaults, without the planned groups. Use AdamW."
        )


def _is_quantised(optimizer: Any) -> bool:
    """Bitsandbytes' 8-bit optimizers, and all of torchao's."""
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
    return bits == 8 or type(optimizer).__module__.partition(".")[0] == "torchao"


def check_sharding(model: nn.Module, wanted: str) -> None:
    """Make sure that what was asked for is what wraps the model.

    Args:
        model: as it is trained.
        wanted: `none`, `ddp`, `dtensor`, `fsdp1` (flat or not), `fsdp1_flat`, `fsdp2` or `zero` (of
            any stage).

    Raises:
        ConfigError: something else, or nothing, wraps it.
    """
    found = sharder_of(model).layout.name
    if found != wanted and (wanted, found) != ("fsdp1", "fsdp1_flat"):
        raise ConfigError(
            f"Invalid sharding: {wanted!r} was asked for, but the model is {found!r}"
            f" ({type(model).__name__}). A plugin was dropped (Accelerate does so on CPU), or"
            " prepare() was not called."
        )
