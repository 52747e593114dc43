"""Refuse, before training, ds_configs and optimizers that would change the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim.schedulers import check_scheduler as check_scheduler
from dist_layerlr.optim.schedulers import torch_scheduler as torch_scheduler
from dist_layerlr.optim.trial import Verdict, try_out
from dist_layerlr.optim.ways import Cut
from dist_layerlr.plan.entries import Shape
from dist_layerlr.ranks import alike
from dist_layerlr.sharders import Layout, sharder_of
from dist_layerlr.sharders.base import innermost
from dist_layerlr.sharders.model import live_parameters, true_shape

_KNOWN = {
    "Adafactor": "It factors its state over whole matrices.",
    "CAME": "It factors its state over whole matrices.",
    "Lamb": "It scales each update by a norm over the whole tensor.",
    "LAMB": "It scales each update by a norm over the whole tensor.",
    "LARS": "It scales each update by a norm over the whole tensor.",
    "Muon": "It orthogonalises whole matrices.",
    "SOAP": "It preconditions whole matrices.",
    "SM3": "It keeps row and column statistics of whole matrices.",
    "Shampoo": "It preconditions whole matrices.",
    "Prodigy": "It adapts one rate for all groups.",
    "DAdaptAdam": "It adapts one rate for all groups.",
}
"""What is known of some classes. It explains a refusal; the trial alone decides."""
_USE_OURS = "Use PlanSchedule(optimizer, Schedule(...)): one multiplier for all rates."


def check_ds_config(config: Mapping[str, Any]) -> None:
    """Refuse settings of a ds_config that take the learning rates over or make them unprovable.

    Raises:
        ConfigError: names the setting, what it would do, and what to write instead.
    """
    scheduler = config.get("scheduler")
    # That one multiplies the rate of each group (read in deepspeed 0.19.8); all others write
    # absolute rates.
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


def check_optimizer(optimizer: Any, model: nn.Module | None = None) -> Verdict:
    """Refuse an optimizer that would train at other rates than its groups say. Collective.

    It is tried on scratch parameters, whole and in the way in which the model's sharder hands over
    the real ones; see ``dist_layerlr.optim.trial``.

    Args:
        optimizer: a torch optimizer, segmented or not.
        model: as it is trained; None: sharded in some way, elements in flat tensors.

    Returns:
        What the trial has shown.

    Raises:
        ConfigError: on all ranks alike: names the optimizer, what was measured and what to use.
    """
    found = innermost(optimizer)
    # The trial takes nothing but the number of dimensions from these: a matrix and a vector are
    # tried in any case.
    shapes: list[Shape] = [(1, 1), (1,)]
    # Without a model, the way that asks most of an optimizer: slices of flat partitions.
    layout = Layout(name="zero", stage=2, shards=True, flat=True)
    if model is not None:
        layout = sharder_of(model).layout
        shapes += [true_shape(param) for param in live_parameters(model).values()]
    # The trial below is collective: a rank that left here alone would keep the others waiting in
    # it.
    alike(lambda: _refuse_adagrad(found, layout))
    owners = [param for group in found.param_groups for param in group["params"]]
    verdict = try_out(found, layout, owners, shapes)
    alike(lambda: refuse(verdict, layout))
    return verdict


def refuse(verdict: Verdict, layout: Layout) -> None:
    """Raise what a trial has shown.

    Raises:
        ConfigError: it has shown a fault.
    """
    if verdict.fault is None:
        return
    known = _KNOWN.get(verdict.optimizer)
    whole = verdict.way == Cut.WHOLE.value
    instead = (
        "Use AdamW."
        if whole
        else (
            "Use AdamW, or DDP, which keeps parameters whole; or name it in the config's"
            " 'optimizers', beside AdamW for the rest: attach then puts its matrices together."
        )
    )
    raise ConfigError(
        f"Invalid optimizer {verdict.optimizer} under {layout.label}: tried on scratch parameters,"
        f" given {verdict.way}: {verdict.fault}.{f' {known}' if known else ''} {instead}"
    )


def _refuse_adagrad(optimizer: Any, layout: Layout) -> None:
    """DeepSpeed asks for this class, and builds another one in place of the user's."""
    if isinstance(optimizer, torch.optim.Adagrad) and layout.engine_steps and layout.shards:
        raise ConfigError(
            "Invalid optimizer Adagrad under ZeRO: DeepSpeed rebuilds it from its constructor's"
            " defaults, without the planned groups. Use AdamW, or attach(emission='segmented')."
        )


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
