"""The models that a running script trains, found without being told."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from dist_layerlr.errors import LayerLRError
from dist_layerlr.plan.entries import ParamInfo
from dist_layerlr.plan.names import canonical_name, parse
from dist_layerlr.sharders import Sharder
from dist_layerlr.sharders.model import FLAT_PARAM, names_of_parameters, true_shape, unwrap

_WRAPPERS = frozenset({"FullyShardedDataParallel", "CheckpointWrapper"})


def find_models(optimizers: Iterable[Any]) -> list[nn.Module]:
    """Outermost modules that hold what an optimizer holds, or what has a gradient.

    A stale optimizer holds nothing of its model, but a backward pass has left gradients there.
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    # The collector knows modules that no constructor has made: copies, and wrapped classes.
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    modules = [m for m in modules if not issubclass(type(m), torch.jit.ScriptModule)]
    inside = {id(child) for m in modules for child in m.__dict__.get("_modules", {}).values()}
    roots: list[tuple[int, nn.Module, set[int]]] = []
    for module in modules:
        if id(module) in inside:
            continue
        used = {id(p) for p in module.parameters() if id(p) in held or p.grad is not None}
        if used:
            roots.append((len(used), module, used))
    # The largest comes first: another root over the same parameters (a pipeline's, a loss that
    # keeps the model) tells nothing new.
    roots.sort(key=lambda root: (-root[0], -_size(root[1])))
    chosen: list[nn.Module] = []
    covered: set[int] = set()
    for _, module, used in roots:
        if used - covered:
            chosen.append(module)
            covered |= used
    return chosen


def _size(model: nn.Module) -> int:
    return sum(1 for _ in model.modules())


class Labels:
    """A label for each model of this process: its class, numbered where several are alike."""

    def __init__(self) -> None:
        self._label: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._taken: Counter[str] = Counter()

    def of(self, model: nn.Module) -> str:
        """The label, which a model keeps."""
        label = self._label.get(model)
        if label is None:
            name = _class_name(unwrap(model))
            self._taken[name] += 1
            number = self._taken[name]
            label = self._label[model] = name if number == 1 else f"{name}#{number}"
        return label


def _class_name(model: nn.Module) -> str:
    """The user's own class, under the one that FSDP1 wraps around it or FSDP2 makes of it."""
    if type(model).__name__ == "FullyShardedDataParallel":
        model = model.get_submodule("_fsdp_wrapped_module")
    kind = type(model)
    if issubclass(kind, FSDPModule) and len(kind.__bases__) > 1:
        kind = kind.__bases__[1]
    return kind.__name__


def infos_of(sharder: Sharder) -> list[ParamInfo]:
    """Every parameter of a wrapped model with its true shape, as far as a wrapper keeps it."""
    classes = _owner_classes(sharder.model)
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for name, param in names_of_parameters(sharder.model):
        if name.rpartition(".")[2] != FLAT_PARAM:
            found[name] = (true_shape(param), param.requires_grad)
    if sharder.layout.name.startswith("fsdp1"):
        # FSDP1's own parameters are flat or empty: the handle alone knows what they were.
        try:
            for weight in sharder.weights():
                if not weight.is_buffer:
                    found[weight.name] = (weight.shape, weight.trainable)
        except LayerLRError:
            pass  # not contiguous before FSDP1 flattened it; the shapes that are live must do
    return [
        ParamInfo(
            name=name, shape=shape, trainable=trained, owner_class=classes.get(parse(name).owner)
        )
        for name, (shape, trained) in found.items()
    ]


def _owner_classes(model: nn.Module) -> dict[tuple[str, ...], str]:
    classes: dict[tuple[str, ...], str] = {}
    for raw, module in unwrap(model).named_modules():
        kind = type(getattr(module, "base_layer", module)).__name__
        if kind not in _WRAPPERS:
            owner = parse(canonical_name(f"{raw}.x" if raw else "x")).owner
            classes.setdefault(owner, kind)
    return classes
