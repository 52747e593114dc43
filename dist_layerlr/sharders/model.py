"""Read a live torch model: names, true shapes, owner classes, whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from dist_layerlr.errors import ConfigError, ModelSourceError, PlanMismatch
from dist_layerlr.plan.build import build_plan
from dist_layerlr.plan.config import Config
from dist_layerlr.plan.entries import ParamInfo, Plan, Shape
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.sharders.own_layers import own_layers

_OUTER_WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine")
FLAT_PARAM = "_flat_param"


def plan_model(model: nn.Module, config: Config | Mapping[str, Any] | str | Path) -> Plan:
    """Plan a live model. Call it before sharding; a meta-device model is enough.

    Args:
        model: the model as it will be trained: adapters injected, ``requires_grad`` set.
        config: the training config (mapping, or JSON, YAML or TOML file) with its ``per_layer_lr``
            block.

    Raises:
        PlanMismatch: names or shapes are already lost (flattened by FSDP1).
        ConfigError, ModelSourceError, UnmatchedParams: as ``build_plan``.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"Invalid model: a {type(model).__name__}. Give the nn.Module that is trained, then its"
            " config."
        )
    infos = describe(model)
    plan = build_plan(infos, config)
    return replace(plan, warnings=(*plan.warnings, *_tie_warnings(model, infos, plan)))


def describe(model: nn.Module) -> list[ParamInfo]:
    """List all parameters, frozen ones included, with true shapes and owner classes.

    Raises:
        PlanMismatch: the model was flattened by FSDP1, so that original names or shapes are gone,
            or a lazy parameter has no shape yet.
    """
    inner = unwrap(model)
    classes, layers = _owner_classes(inner), own_layers(inner)
    infos = []
    for raw, param in inner.named_parameters():
        _refuse_flat(raw, inner)
        if isinstance(param, UninitializedParameter):
            raise PlanMismatch(
                f"Parameter {raw!r} of {type(inner).__name__} has no shape before the first forward"
                " (LazyLinear ...). Run one batch through the model, then make the plan."
            )
        name = canonical_name(raw)
        infos.append(
            ParamInfo(
                name=name,
                shape=true_shape(param),
                trainable=param.requires_grad,
                owner_class=classes.get(parse(name).owner),
                layer=layers.get(name),
            )
        )
    return infos


def _tie_warnings(model: nn.Module, infos: list[ParamInfo], plan: Plan) -> list[str]:
    """A tied parameter trains under its first name.

    Say so where its other name would have another rate.
    """
    first: dict[int, str] = {}
    others: dict[str, ParamInfo] = {}
    owners: dict[str, str] = {}
    layers = own_layers(unwrap(model))
    for name, param in names_of_parameters(model, tied=True):
        kept = first.setdefault(id(param), name)
        if kept != name:
            others[name] = ParamInfo(
                name=name,
                shape=true_shape(param),
                trainable=param.requires_grad,
                layer=layers.get(name),
            )
            owners[name] = kept
    if not others:
        return []
    # What shapes say is left out: a base model's file may know one of the names only.
    unscaled = replace(plan.config, width_scaling=None)
    asked = build_plan([*infos, *others.values()], unscaled).entries
    return [
        f"{other} is tied to {kept} and trains at its lr {asked[kept].lr:g}, not at"
        f" {asked[other].lr:g}"
        for other, kept in owners.items()
        if other in asked and kept in asked and asked[other].lr != asked[kept].lr
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """Take off DDP, DataParallel, a DeepSpeed engine, Fabric's wrapper and torch.compile.

    FSDP stays: it is told by segments of the names.
    """
    while True:
        kinds = {c.__name__ for c in type(model).__mro__}
        if kinds.intersection(_OUTER_WRAPPERS):
            model = model.get_submodule("module")
        elif "OptimizedModule" in kinds:
            model = model.get_submodule("_orig_mod")
        elif "_FabricModule" in kinds:
            model = model.get_submodule("_forward_module")
        else:
            return model


def materialize(module: nn.Module, device: torch.device | str, *, recurse: bool = True) -> None:
    """Give meta parameters uninitialised memory, sharded ones for their shard only.

    What is real stays, on ``device``.

    Parameters keep their identity, so ties and groups hold. For FSDP1, pass
    ``param_init_fn=lambda module: materialize(module, device, recurse=False)``; for ZeRO-3, call
    ``partition_empty``.

    Raises:
        ModelSourceError: a buffer is on the meta device, so that nothing knows its values.
    """
    for name, buffer in module.named_buffers(recurse=recurse):
        if buffer.is_meta:
            raise ModelSourceError(
                f"Buffer {name!r} of {type(module).__name__} is on the meta device: its values are"
                " lost. Build the model under"
                " accelerate.init_empty_weights(include_buffers=False)."
            )
    for param in module.parameters(recurse=recurse):
        if param.is_meta:
            empty = nn.Parameter(torch.empty_like(param, device=device), param.requires_grad)
            torch.utils.swap_tensors(param, empty)  # type: ignore[no-untyped-call]
    if recurse:
        module.to(device)  # buffers; FSDP2 also looks at its new shards here


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """What a model consists of, from one walk over its modules: every sharder asks this."""

    model: type[nn.Module]
    modules: frozenset[type[nn.Module]]
    """Classes of all modules, the model's own among them."""
    parameters: frozenset[type[Any]]
    """Classes of all parameters."""

    @classmethod
    def of(cls, model: nn.Module) -> Kinds:
        """Of a model as it is wrapped now."""
        modules: set[type[nn.Module]] = set()
        parameters: set[type[Any]] = set()
        # Module.parameters() costs three times as much, and every attach and verify comes here.
        for module in model.modules():
            modules.add(type(module))
            parameters.update(map(type, module._parameters.values()))
        return cls(model=type(model), modules=frozenset(modules), parameters=frozenset(parameters))


def names_of_parameters(
    model: nn.Module, *, tied: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, live parameter), in the module's order; tied ones once unless ``tied``."""
    for raw, param in unwrap(model).named_parameters(remove_duplicate=not tied):
        yield canonical_name(raw), param


def live_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{canonical name: live parameter}, tied parameters once."""
    return dict(names_of_parameters(model))


def true_shape(param: nn.Parameter) -> Shape:
    """Shape before partitioning: ZeRO-3 keeps it in ``ds_shape``.

    A DTensor reports its global shape itself.
    """
    return tuple(getattr(param, "ds_shape", param.shape))


def _owner_classes(model: nn.Module) -> dict[tuple[str, ...], str]:
    """Class of every module, under the path its parameters parse to.

    An adapted module counts as what it adapts.
    """
    classes: dict[tuple[str, ...], str] = {}
    for raw, module in model.named_modules():
        owner = parse(canonical_name(f"{raw}.x" if raw else "x")).owner
        base = getattr(module, "base_layer", module)
        classes.setdefault(owner, type(base).__name__)
    return classes


def _refuse_flat(raw: str, model: nn.Module) -> None:
    segments = raw.split(".")
    if segments[-1] == FLAT_PARAM or "_fsdp_wrapped_module" in segments:
        raise PlanMismatch(
            f"Parameter {raw!r} of {type(model).__name__} was already flattened by FSDP1: its true"
            " shape is gone. Make the plan before wrapping (plan_model(model, config), then"
            " FSDP(model))."
        )
