"""Refuse what a model must not have when streaming starts, and what must not change meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import nn
from torch.optim import Optimizer

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.internals import (
    accumulate_hooks,
    call_is_compiled,
    in_grad_transform,
    in_live_graph,
    registered_parameter,
    wraps_compiled,
)
from dist_layerlr.offload.masters import Master
from dist_layerlr.offload.units import UnitSpec
from dist_layerlr.ranks import world_size

_FSDP = "use fully_shard(..., offload_policy=CPUOffloadPolicy())"
_WRAPPERS = {
    "DistributedDataParallel": (
        "stream the model first, call handle.exclude_from_ddp(), then wrap it"
    ),
    "DataParallel": "use DistributedDataParallel, one process per device",
    "FullyShardedDataParallel": f"FSDP owns its storage: {_FSDP}",
    "FSDPModule": f"FSDP owns its storage: {_FSDP}",
    "DeepSpeedEngine": "ZeRO owns its storage: set zero_optimization.offload_param in its config",
}


class GroupWatch:
    """Watches an optimizer's groups while its model is streamed.

    The same parameters must stay in the same groups, and only the user may change learning rates.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._members = self._read()
        self._rates = self._read_rates()

    def begin(self) -> None:
        """A forward begins: compare the members with those at the start, and note the rates.

        Raises:
            OffloadError: as ``check``.
        """
        self.check()
        self._rates = self._read_rates()

    def end(self) -> None:
        """A forward ends: nobody may have stepped or scheduled during it.

        Raises:
            OffloadError: a group changed meanwhile.
        """
        self.check()
        if self._read_rates() != self._rates:
            raise OffloadError(
                "A learning rate changed while the streamed model ran. Step schedulers between"
                " passes."
            )

    def check(self) -> None:
        """Compare the members with those at the start of streaming.

        Raises:
            OffloadError: parameters were added, removed, replaced or regrouped.
        """
        # zip_longest, because a group that was added or removed differs from nothing.
        for index, (now, before) in enumerate(zip_longest(self._read(), self._members)):
            if now != before:
                raise OffloadError(
                    f"Parameter group {index} of the optimizer changed since stream(): its tensors"
                    " are not the same objects. Call handle.remove(), change the optimizer, and"
                    " stream again."
                )

    def _read_rates(self) -> list[object]:
        return [group.get("lr") for group in self._optimizer.param_groups]

    def _read(self) -> list[list[int]]:
        # Identities, because the parameters must be the same objects; values may change.
        return [[id(p) for p in group["params"]] for group in self._optimizer.param_groups]


def check_model(model: nn.Module) -> None:
    """Refuse wrappers that own the parameters' storage or hold on to them.

    Raises:
        OffloadError: naming what to do instead.
    """
    for name, module in model.named_modules():
        # By name, so that none of the libraries is imported; over the bases, because FSDP2 makes a
        # class of its own of each wrapped one.
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                where = f"Module {name!r}" if name else "The model"
                raise OffloadError(f"{where} is a {kind.__name__}: {_WRAPPERS[kind.__name__]}.")


def check_units(model: nn.Module, specs: Sequence[UnitSpec], streamed: Iterable[nn.Module]) -> None:
    """Refuse units that cannot be streamed in the state that the model is in.

    Such units are streamed already, held by a live graph, compiled together with their hooks,
    stepped during backward, or reduced over several ranks.

    Args:
        model: the whole model.
        specs: its units.
        streamed: modules of handles that are not removed.

    Raises:
        OffloadError: naming the module or parameter.
    """
    taken = {id(m) for m in streamed}
    if any(id(m) in taken for m in model.modules()):
        raise OffloadError(
            f"{type(model).__name__} is streamed already. Call remove() on its handle first."
        )
    for spec in specs:
        _refuse_compiled(model, spec)
        _refuse_steps_in_backward(spec)
    # A graph that is alive would accumulate on the device that the parameter had when it was built.
    for name, param in model.named_parameters():
        if in_live_graph(param):
            raise OffloadError(
                f"Parameter {name} is held by a live autograd graph (or a gradient reducer). "
                "Stream the model before its first forward, or after backward() and del loss."
            )
    ranks = world_size()
    trainable = next((spec.trainable[0] for spec in specs if spec.trainable), None)
    if ranks > 1 and trainable is not None:
        raise OffloadError(
            f"Parameter {trainable.name} is trainable and streamed on {ranks} ranks: DDP cannot"
            f" reduce its gradient. Set stream_trainable=False, or {_FSDP}."
        )


def _refuse_steps_in_backward(spec: UnitSpec) -> None:
    for weight in spec.trainable:
        if accumulate_hooks(weight.param):
            raise OffloadError(
                f"Parameter {weight.name} has a post-accumulate-grad hook, as optimizers that step"
                " during backward do: its gradient would be on its way to the host. Step after"
                " backward, or set stream_trainable=False."
            )


def _refuse_compiled(model: nn.Module, spec: UnitSpec) -> None:
    """Refuse a unit whose call, or that of a module above it, is compiled.

    Hooks must run outside the compiled code: with a compiled ``forward`` they do, with a compiled
    call they do not.
    """
    segments = spec.name.split(".") if spec.name else []
    for depth in range(len(segments) + 1):
        path = ".".join(segments[:depth])  # from the model itself ("") down to the unit
        module = model.get_submodule(path)
        # A unit that torch.compile returned is called with its hooks outside the compiled module.
        wraps = module is not spec.module and wraps_compiled(module)
        if wraps or call_is_compiled(module):
            raise OffloadError(
                f"Module {path or type(module).__name__!r} is compiled together with its hooks,"
                f" where unit {spec.name!r} cannot be fetched. Compile the forward of each block:"
                " block.forward = torch.compile(block.forward)."
            )


def check_autocast(device_type: str, name: str, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse autocast with its cache on for a unit with float32 weights that train.

    Autocast caches the cast of every such weight, on the device, until the region ends.

    Args:
        device_type: of the device that computes.
        name: of the unit.
        dtypes: of its streamed trainable weights.

    Raises:
        OffloadError: the forward runs in such a region.
    """
    if not torch.is_autocast_enabled(device_type) or not torch.is_autocast_cache_enabled():
        return
    if torch.float32 in dtypes:
        raise OffloadError(
            f"Unit {name} has streamed float32 weights that train under autocast with its cache on:"
            " every cast weight would stay on the device. Use torch.autocast(...,"
            " cache_enabled=False), or a bfloat16 model."
        )


def check_process(streamed_in: int) -> None:
    """Refuse a fetch in a forked process, which has none of its parent's pinned pages and threads.

    Raises:
        OffloadError: this process did not call ``stream``.
    """
    if os.getpid() != streamed_in:
        raise OffloadError(
            f"Process {os.getpid()} was forked from {streamed_in}, which streams the model: its"
            " pinned memory and threads stay there. Use the model there, or stream one here."
        )


def check_transform(name: str) -> None:
    """Refuse a fetch of a unit, by its name, under a function transform that differentiates.

    Raises:
        OffloadError: torch.func.grad, vjp or jvp is running.
    """
    if in_grad_transform():
        raise OffloadError(
            f"Unit {name} cannot be fetched inside torch.func.grad, vjp or jvp, which allow no"
            " copies into memory of others. Use torch.autograd.grad, or"
            " torch.autograd.forward_ad."
        )


def check_masters(masters: Iterable[Master]) -> None:
    """Refuse parameters that do not point at their masters, as they must at rest.

    Raises:
        OffloadError: naming the parameter and what was done to it.
    """
    for master in masters:
        change = _change_since_stream(master)
        if change:
            raise OffloadError(
                f"Parameter {master.name} {change} after stream(). Call handle.remove() first, "
                "change the model, and stream again."
            )


def _change_since_stream(master: Master) -> str | None:
    """What a user did to a parameter that is at rest; None: nothing that matters."""
    param = master.weight.param
    if registered_parameter(master.weight.owner, master.weight.leaf) is not param:
        return "was replaced (load_state_dict(assign=True), or a swapped module)"
    if param.data_ptr() != master.home or param.dtype != master.dtype:
        return "was moved or cast (.to(), .half(), .share_memory(), ...)"
    if param.requires_grad and not master.trainable:
        return "was unfrozen"
    return None
