"""Find the units of a model: the blocks of its stacks, or single modules with large weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.internals import wraps_checkpoint
from dist_layerlr.offload.policy import AUTO, BLOCK, StreamPolicy
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.plan.stacks import Location, StackMap

_ZERO = (
    "shard with ZeRO's own 'offload_param' instead (zero_optimization.offload_param in ds_config)"
)
_FSDP = "use fully_shard(..., offload_policy=CPUOffloadPolicy()) with its prefetch settings instead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """A streamed parameter and the module attribute that holds it."""

    name: str
    """As in ``model.named_parameters()``."""
    owner: nn.Module
    """The module that registered the parameter."""
    leaf: str
    """Its attribute in ``owner``."""
    param: nn.Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitSpec:
    """A module whose large weights are copied to the device together."""

    name: str
    """Dotted path of the module."""
    module: nn.Module
    weights: tuple[Streamed, ...]
    """The parameters that are streamed."""
    numel: int
    """Elements of all parameters of the module, those that stay on the device included."""

    @property
    def trainable(self) -> tuple[Streamed, ...]:
        """The streamed parameters that require a gradient."""
        return tuple(w for w in self.weights if w.param.requires_grad)


def find_units(model: nn.Module, policy: StreamPolicy) -> list[UnitSpec]:
    """Find the units of a model, in the order of its forward pass as far as names tell it.

    Raises:
        OffloadError: no unit was found, or a parameter cannot be streamed; nothing was changed.
    """
    found = dict(_blocks(model) if policy.mode == BLOCK else _layers(model, policy))
    if not found:
        raise OffloadError(_no_modules(model, policy))
    names = {id(p): name for name, p in model.named_parameters()}
    specs: list[UnitSpec] = []
    for path, module in found.items():
        spec = _unit_spec(path, module, policy, names)
        if spec.weights:
            specs.append(spec)
    if not specs:
        raise OffloadError(
            f"Nothing to stream in the {len(found)} {policy.mode}s of {type(model).__name__}: no"
            f" parameter that may be streamed has min_numel={policy.min_numel} elements or more."
            " Lower min_numel."
        )
    _refuse_tied(model, specs)
    for spec in specs:
        for weight in spec.weights:
            _refuse_kind(weight)
            _refuse_encoding(weight, policy.host_dtype)
    _refuse_shared_memory(model, specs)
    return specs


def _no_modules(model: nn.Module, policy: StreamPolicy) -> str:
    """Say why no module of this model can be a unit, and which setting to change."""
    missing = f"No {policy.mode}s to stream in {type(model).__name__}: "
    if policy.mode == BLOCK:
        return missing + "it has no stack of blocks (see dist-layerlr plan). Use mode='layer'."
    return missing + (
        f"no module owns a parameter of min_numel={policy.min_numel} elements or more."
        " Lower min_numel."
    )


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of the stacks that the plan knows, from the trunk's first to its last."""
    paths = [parse(canonical_name(name)) for name, _ in model.named_parameters()]
    stacks = StackMap(paths)
    places: dict[tuple[str, ...], Location] = {}
    for path in paths:
        place = stacks.locate(path)
        if place is not None:
            places.setdefault(path.owner[: place.depth], place)
    modules: dict[tuple[str, ...], tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        # canonical_name takes names of parameters; ".x" makes one of a module's path.
        owner = parse(canonical_name(f"{name}.x" if name else "x")).owner
        # Recomputation runs the wrapped module again, but not the checkpoint wrapper around it,
        # so hooks on the wrapper would miss recomputation. Both have one canonical name.
        if owner in places and not wraps_checkpoint(module):
            modules.setdefault(owner, (name, module))
    # Trunks come in the order in which the model names them.
    trunks = [owner[:-2] for owner in places]

    def forward_order(owner: tuple[str, ...]) -> tuple[bool, int, int]:
        place = places[owner]
        return place.auxiliary, trunks.index(owner[:-2]), place.trunk_block

    for owner in sorted(places, key=forward_order):
        if owner in modules:
            yield modules[owner]


def _layers(model: nn.Module, policy: StreamPolicy) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that own a large parameter; modules below go with them."""
    taken: list[str] = []
    for name, module in model.named_modules():
        # str.startswith takes a tuple; the dot keeps "blocks.1" from taking "blocks.10".
        if name.startswith(tuple(taken)):
            continue
        owned = module.named_parameters(recurse=False)
        if any(_is_streamed(f"{name}.{leaf}", p, policy) for leaf, p in owned):
            taken.append(f"{name}.")
            yield name, module


def _is_streamed(name: str, param: nn.Parameter, policy: StreamPolicy) -> bool:
    if param.numel() < policy.min_numel:
        return False
    if not param.requires_grad:
        return True
    if policy.stream_trainable == AUTO:
        return not parse(canonical_name(name)).is_adapter
    return bool(policy.stream_trainable)


def _unit_spec(
    path: str, module: nn.Module, policy: StreamPolicy, names: dict[int, str]
) -> UnitSpec:
    # The key is the parameter's identity: one that is tied inside the unit is streamed once.
    weights: dict[int, Streamed] = {}
    for prefix, owner in module.named_modules():
        for leaf, param in owner.named_parameters(recurse=False):
            name = ".".join(part for part in (path, prefix, leaf) if part)
            if _is_streamed(name, param, policy) and id(param) not in weights:
                weights[id(param)] = Streamed(
                    name=names[id(param)], owner=owner, leaf=leaf, param=param
                )
    numel = sum(p.numel() for p in module.parameters())
    return UnitSpec(name=path, module=module, weights=tuple(weights.values()), numel=numel)


def _refuse_tied(model: nn.Module, specs: list[UnitSpec]) -> None:
    """Refuse a streamed parameter that a module outside its unit registers, too.

    That module would run while the parameter is on the host.
    """
    places: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(param), []).append(name)
    for unit in specs:
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


def _refuse_shared_memory(model: nn.Module, specs: list[UnitSpec]) -> None:
    """Refuse a streamed parameter whose memory is another's, too, wholly or in part, if one trains.

    Each would get a master of its own, and from then on a value of its own.
    """
    streamed = {id(w.param) for spec in specs for w in spec.weights}
    places: list[tuple[str, int, int, str, nn.Parameter]] = []
    for name, param in model.named_parameters():
        # Subclasses and meta tensors have no address to compare.
        if type(param.data) is torch.Tensor and not param.is_meta and param.numel():
            begin = param.data_ptr()
            places.append((str(param.device), begin, begin + _extent(param), name, param))
    before: list[tuple[str, int, int, str, nn.Parameter]] = []
    # By address, so that what a range may lie over has come before it and has not ended.
    for place in sorted(places, key=lambda place: place[:2]):
        device, begin, _, name, param = place
        before = [other for other in before if other[0] == device and other[2] > begin]
        for _, _, _, other, tied in before:
            trains = param.requires_grad or tied.requires_grad
            if trains and streamed & {id(param), id(tied)} and _overlap(param, tied):
                raise OffloadError(
                    f"Parameters {other} and {name} share memory (a.data = b.data), and streaming"
                    " would give each a value of its own. Tie the parameters (a = b) inside one"
                    " unit, or copy the data, or set min_numel above"
                    f" {max(param.numel(), tied.numel())}."
                )
        before.append(place)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors whose ranges of memory meet have a byte in common.

    Columns of one matrix do not, nor do every second element and those between.
    """
    if _extent(one) == one.nbytes and _extent(other) == other.nbytes:
        return True  # without gaps in them, where the other could lie
    begin = min(one.data_ptr(), other.data_ptr())
    end = max(one.data_ptr() + _extent(one), other.data_ptr() + _extent(other))
    bytes_ = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    found = False
    for tensor in (one, other):
        size = tensor.element_size()
        # An expanded dimension shows the same bytes again.
        shape = [n if step else 1 for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
        strides = [step * size for step in tensor.stride()]
        part = bytes_.as_strided((*shape, size), (*strides, 1), tensor.data_ptr() - begin)
        found = bool(part.any())
        part.fill_(True)
    return found


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _refuse_kind(weight: Streamed) -> None:
    """Refuse a parameter that is not a plain tensor: ``.data`` can be repointed on those only."""
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


def _refuse_encoding(weight: Streamed, host_dtype: str | None) -> None:
    """Refuse ``host_dtype`` for what it would round a second time, or cannot scale."""
    dtype = weight.param.dtype
    if host_dtype is None or weight.param.requires_grad:
        return
    if not dtype.is_floating_point or dtype.itemsize == 1:
        raise OffloadError(
            f"Parameter {weight.name} is {str(dtype).removeprefix('torch.')}:"
            f" host_dtype={host_dtype!r} is for floating-point weights of 16 bits or more. Set"
            " host_dtype=None, which streams the weights as they are."
        )
