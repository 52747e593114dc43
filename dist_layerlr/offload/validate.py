"""What must not change under a running stream, and what must not be there when it starts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.internals import accumulate_hooks, in_live_graph
from dist_layerlr.offload.units import Cut

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
    """An optimizer's groups: the same parameters in the same groups, and rates that only the user
    changes.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._members = self._read()
        self._rates = self._read_rates()

    def begin(self) -> None:
        """Start of a forward: compare members with the start of streaming, note the rates.

        Raises:
            OffloadError: as ``check``.
        """
        self.check()
        self._rates = self._read_rates()

    def end(self) -> None:
        """End of a forward, during which nobody steps or schedules.

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
        """Compare with the start.

        Raises:
            OffloadError: parameters were added, removed, replaced or regrouped.
        """
        members = self._read()
        if members != self._members:
            index = next(
                (i for i, (a, b) in enumerate(zip(members, self._members, strict=False)) if a != b),
                len(members),
            )
            raise OffloadError(
                f"Parameter group {index} of the optimizer changed since stream(): its tensors are"
                " not the same objects. Call handle.remove(), change the optimizer, and stream"
                " again."
            )

    def _read_rates(self) -> list[object]:
        return [group.get("lr") for group in self._optimizer.param_groups]

    def _read(self) -> list[list[int]]:
        return [[id(p) for p in group["params"]] for group in self._optimizer.param_groups]


def check_model(model: nn.Module) -> None:
    """Refuse wrappers that own the parameters' storage or hold on to them.

    Raises:
        OffloadError: naming what to do instead.
    """
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                where = f"Module {name!r}" if name else "The model"
                raise OffloadError(f"{where} is a {kind.__name__}: {_WRAPPERS[kind.__name__]}.")


def check_cuts(model: nn.Module, cuts: Iterable[Cut], streamed: Iterable[nn.Module]) -> None:
    """Refuse units that are streamed already, that a live graph holds, or that are compiled with
    their hooks.

    Args:
        model: the whole model.
        cuts: its units.
        streamed: modules of handles that are not removed.

    Raises:
        OffloadError: naming the module or parameter.
    """
    taken = {id(m) for m in streamed}
    if any(id(m) in taken for m in model.modules()):
        raise OffloadError(
            f"{type(model).__name__} is streamed already. Call remove() on its handle first."
        )
    for cut in cuts:
        _refuse_compiled(model, cut)
        _refuse_steps_in_backward(cut)
    for name, param in model.named_parameters():
        if in_live_graph(param):
            raise OffloadError(
                f"Parameter {name} is held by a live autograd graph (or a gradient reducer). "
                "Stream the model before its first forward, or after backward() and del loss."
            )
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    trainable = [w.name for cut in cuts for w in cut.weights if w.param.requires_grad]
    if ranks > 1 and trainable:
        raise OffloadError(
            f"Parameter {trainable[0]} is trainable and streamed on {ranks} ranks: DDP cannot"
            f" reduce its gradient. Set stream_trainable=False, or {_FSDP}."
        )


def _refuse_steps_in_backward(cut: Cut) -> None:
    for weight in cut.weights:
        if weight.param.requires_grad and accumulate_hooks(weight.param):
            raise OffloadError(
                f"Parameter {weight.name} has a post-accumulate-grad hook, as optimizers that step"
                " during backward do: its gradient would be on its way to the host. Step after"
                " backward, or set stream_trainable=False."
            )


def _refuse_compiled(model: nn.Module, cut: Cut) -> None:
    """Hooks must run outside the compiled code: compiling ``forward`` does that, compiling the call
    does not.
    """
    segments = cut.name.split(".") if cut.name else []
    paths = [".".join(segments[:i]) for i in range(len(segments) + 1)]
    above = [(path, model.get_submodule(path)) for path in paths]
    for path, module in above:
        wraps = module is not cut.module and hasattr(module, "_orig_mod")
        if wraps or getattr(module, "_compiled_call_impl", None) is not None:
            raise OffloadError(
                f"Module {path or type(module).__name__!r} is compiled together with its hooks,"
                f" where unit {cut.name!r} cannot be fetched. Compile the forward of each block:"
                " block.forward = torch.compile(block.forward)."
            )


def check_autocast(device_type: str, name: str, dtypes: Iterable[torch.dtype]) -> None:
    """Autocast's cache would keep the cast of every streamed trainable weight on the device until
    the region ends.

    Raises:
        OffloadError: in such a region.
    """
    if not torch.is_autocast_enabled(device_type) or not torch.is_autocast_cache_enabled():
        return
    if torch.float32 in dtypes:
        raise OffloadError(
            f"Unit {name} has streamed float32 weights that train under autocast with its cache on:"
            " every cast weight would stay on the device. Use torch.autocast(...,"
            " cache_enabled=False), or a bfloat16 model."
        )
