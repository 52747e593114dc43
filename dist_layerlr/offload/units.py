"""What a model is cut into: blocks of its stacks, or single modules with large weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.policy import AUTO, BLOCK, StreamPolicy
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.plan.stacks import Location, StackMap

_ZERO = (
    "shard with ZeRO's own 'offload_param' instead (zero_optimization.offload_param in ds_config)"
)
_FSDP = "use fully_shard(..., offload_policy=CPUOffloadPolicy()) with its prefetch settings instead"
_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A streamed parameter and where it hangs."""

    name: str
    """As in ``model.named_parameters()``."""
    owner: nn.Module
    leaf: str
    param: nn.Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A module whose large weights come and go together."""

    name: str
    module: nn.Module
    weights: tuple[Weight, ...]
    """What is streamed."""
    numel: int
    """Elements of all its parameters."""


def cut(model: nn.Module, policy: StreamPolicy) -> list[Cut]:
    """Find the units of a model, in the order of its forward pass as far as names tell it.

    Raises:
        OffloadError: none found, or a parameter that cannot be streamed; nothing was changed.
    """
    found = dict(_blocks(model) if policy.mode == BLOCK else _layers(model, policy))
    if not found:
        raise OffloadError(
            f"No {policy.mode}s to stream in {type(model).__name__}: "
            + (
                "it has no stack of blocks (see dist-layerlr plan). Use mode='layer'."
                if policy.mode == BLOCK
                else (
                    f"no module owns a parameter of min_numel={policy.min_numel} elements or more."
                    " Lower min_numel."
                )
            )
        )
    names = {id(p): name for name, p in model.named_parameters()}
    cuts = [_cut(model, path, module, policy, names) for path, module in found.items()]
    cuts = [c for c in cuts if c.weights]
    if not cuts:
        raise OffloadError(
            f"Nothing to stream in the {len(found)} {policy.mode}s of {type(model).__name__}: no"
            f" parameter that may be streamed has min_numel={policy.min_numel} elements or more."
            " Lower min_numel."
        )
    _refuse_tied(model, cuts)
    for weight in (w for c in cuts for w in c.weights):
        _refuse_kind(weight)
    return cuts


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks of the stacks that the plan knows, trunk first to last."""
    paths = [parse(canonical_name(name)) for name, _ in model.named_parameters()]
    stacks = StackMap(paths)
    places: dict[tuple[str, ...], Location] = {}
    for path in paths:
        place = stacks.locate(path)
        if place is not None:
            places.setdefault(path.owner[: place.depth], place)
    modules: dict[tuple[str, ...], tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        owner = parse(canonical_name(f"{name}.x" if name else "x")).owner
        # A checkpoint wrapper does not run again in recomputation, what it wraps does.
        if owner in places and not hasattr(module, _CHECKPOINT_WRAPPER):
            modules.setdefault(owner, (name, module))
    order = sorted(
        places,
        key=lambda owner: (
            places[owner].auxiliary,
            _parent(owner, places),
            places[owner].trunk_block,
        ),
    )
    yield from (modules[owner] for owner in order if owner in modules)


def _parent(owner: tuple[str, ...], places: dict[tuple[str, ...], Location]) -> int:
    """Trunks in the order in which the model names them."""
    trunk = [o[:-2] for o in places]
    return trunk.index(owner[:-2])


def _layers(model: nn.Module, policy: StreamPolicy) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules that own a large parameter themselves; what lies below goes with them."""
    taken: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(f"{t}.") for t in taken):
            continue
        if any(
            _streams(f"{name}.{leaf}", p, policy)
            for leaf, p in module.named_parameters(recurse=False)
        ):
            taken.add(name)
            yield name, module


def _streams(name: str, param: nn.Parameter, policy: StreamPolicy) -> bool:
    if param.numel() < policy.min_numel:
        return False
    if not param.requires_grad:
        return True
    if policy.stream_trainable == AUTO:
        return not parse(canonical_name(name)).is_adapter
    return bool(policy.stream_trainable)


def _cut(
    model: nn.Module, path: str, module: nn.Module, policy: StreamPolicy, names: dict[int, str]
) -> Cut:
    weights: dict[int, Weight] = {}
    for prefix, owner in module.named_modules():
        for leaf, param in owner.named_parameters(recurse=False):
            name = ".".join(part for part in (path, prefix, leaf) if part)
            if _streams(name, param, policy):
                weights.setdefault(
                    id(param), Weight(name=names[id(param)], owner=owner, leaf=leaf, param=param)
                )
    numel = sum(p.numel() for p in module.parameters())
    return Cut(name=path, module=module, weights=tuple(weights.values()), numel=numel)


def _refuse_tied(model: nn.Module, cuts: list[Cut]) -> None:
    places: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(param), []).append(name)
    for unit in cuts:
        below = {id(m) for m in unit.module.modules()}
        for weight in unit.weights:
            for other in places[id(weight.param)]:
                owner = model.get_submodule(other.rpartition(".")[0])
                if id(owner) not in below:
                    raise OffloadError(
                        f"Parameter {weight.name} is tied to {other} outside {unit.name}: it cannot"
                        " leave the device with one of them. Untie them, or set min_numel above"
                        f" {weight.param.numel()}."
                    )


def _refuse_kind(weight: Weight) -> None:
    """Only plain tensors with values of their own can be repointed."""
    param, kind = weight.param, type(weight.param.data).__name__
    if hasattr(param, "ds_id"):
        raise OffloadError(f"Parameter {weight.name} is partitioned by DeepSpeed ZeRO-3: {_ZERO}.")
    if kind == "DTensor":
        raise OffloadError(
            f"Parameter {weight.name} is a DTensor (sharded by FSDP2 or tensor parallelism):"
            f" {_FSDP}."
        )
    if type(param.data) is not torch.Tensor:
        raise OffloadError(
            f"Parameter {weight.name} is a {kind}, not a plain tensor: it cannot be streamed."
            " Stream the unquantised model; host_dtype='int8' or 'float8_e4m3fn' stores it in 8"
            " bits."
        )
    if param.is_meta:
        raise OffloadError(
            f"Parameter {weight.name} is on the meta device. Load its weights before stream()."
        )
