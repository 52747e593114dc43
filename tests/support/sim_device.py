"""`sim`: an accelerator without hardware. Tensors on it have values, but no CPU tensor can be mixed
with them.

Built on torch's Python backend for PrivateUse1 (private; written for torch 2.13): every storage on
`sim` stands for a CPU buffer, every operator runs on those buffers. Views alias, `.data` may cross
devices, autograd applies its device rules, and the bytes alive are known exactly. Import it before
any backward pass of the process; exceptions of kernels may end it.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"


class _Runtime:
    """What torch asks a device module for."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.empty(0, dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    device = staticmethod(lambda device: contextlib.nullcontext())


_setup_privateuseone_for_python_backend(NAME, backend_module=_Runtime())

_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)
_AS_STRIDED = torch.ops.aten.as_strided.default
_VIEW_DTYPE = torch.ops.aten.view.dtype
_buffers: dict[int, tuple[StorageWeakRef, Tensor]] = {}
"""{sim storage: (weak reference, its bytes)}."""


_SWEEP_AT = 3000
observer: Any = None
"""Told of every kernel, copy and new storage: ``tests.support.races``."""


class Clock:
    """Counts kernels, and remembers the last one that touched each storage."""

    now = 0
    touched: dict[int, int] = {}
    paused = False
    """While the copy queue runs kernels of its own."""


def allocated() -> int:
    """Bytes of all storages alive on the device."""
    _sweep()
    return sum(buffer.numel() for _, buffer in _buffers.values())


def _sweep() -> None:
    for key in [key for key, (ref, _) in _buffers.items() if ref.expired()]:
        del _buffers[key]
        Clock.touched.pop(key, None)


def _on_sim(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _values(tensor: Tensor) -> Tensor:
    """The CPU tensor that a sim tensor stands for."""
    buffer = _buffers[tensor.untyped_storage()._cdata][1]
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(
        buffer.untyped_storage(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    )


def _new(values: Tensor) -> Tensor:
    """A sim tensor on a new storage, laid out as ``values``, whose memory it takes."""
    if values._is_view():
        values = values.clone()
    base = torch._C._acc.create_empty_tensor((1,), values.dtype)
    storage = base.untyped_storage()
    buffer = torch.empty(0, dtype=torch.uint8)
    buffer.set_(values.untyped_storage())
    _buffers[storage._cdata] = (StorageWeakRef(storage), buffer)
    Clock.touched.pop(storage._cdata, None)
    if observer is not None:
        observer.born(storage._cdata, StorageWeakRef(storage))
    if len(_buffers) > _SWEEP_AT:
        _sweep()
    return _AS_STRIDED.redispatch(
        _META, base, tuple(values.shape), values.stride(), values.storage_offset()
    )


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operator on the buffers."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def lower(tensor: Tensor) -> Tensor:
        if tensor.device.type != NAME:
            if tensor.device.type == "cpu" and tensor.dim() > 0:
                raise RuntimeError(
                    f"{op}: Expected all tensors to be on the same device, but found cpu and sim"
                )
            return tensor
        pairs.append((tensor, _values(tensor)))
        return pairs[-1][1]

    lowered = [_map(lower, value) for value in args]
    keywords = {key: _map(lower, value) for key, value in kwargs.items()}
    if keywords.get("device") is not None:
        keywords["device"] = "cpu"
    _tick(op, [tensor for tensor, _ in pairs])
    if observer is not None and not _makes_a_view(op):
        written = _written(op, args, kwargs)
        observer.kernel(op.name(), [tensor for tensor, _ in pairs], written)
        if op is torch.ops.aten._local_scalar_dense.default:
            observer.host_waits(observer.current().clock)
    return _map(lambda out: _lift(out, pairs), op(*lowered, **keywords))


def _written(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator writes to."""
    found: list[Tensor] = []
    for i, name in _places_written(op):
        value = args[i] if i < len(args) else kwargs.get(name)
        _map(lambda tensor: found.append(tensor) if _on_sim(tensor) else None, value)
    return found


@functools.cache
def _places_written(op: Any) -> list[tuple[int, str]]:
    """(position, name) of the arguments that an operator writes to."""
    found: list[tuple[int, str]] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append((i, argument.name))
    return found


@functools.cache
def _makes_a_view(op: Any) -> bool:
    returns = op._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _map(change: Any, value: Any) -> Any:
    """Change the tensors in a value, a list or a tuple."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(change, v) for v in value])
    return value


def _tick(op: Any, tensors: list[Tensor]) -> None:
    """Views are no kernels."""
    if Clock.paused or _makes_a_view(op):
        return
    Clock.now += 1
    for tensor in tensors:
        if _on_sim(tensor):
            Clock.touched[tensor.untyped_storage()._cdata] = Clock.now


def _lift(out: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A result as a sim tensor: an argument itself, a view of one, or new."""
    for tensor, values in pairs:
        if out is values:
            if out.shape != tensor.shape:  # an `out=` that was resized
                tensor.data = _new(out)
            return tensor
    pointer = out.untyped_storage().data_ptr()
    for tensor, values in pairs:
        if pointer != 0 and pointer == values.untyped_storage().data_ptr():
            base = tensor
            if out.dtype != tensor.dtype:
                base = _VIEW_DTYPE.redispatch(
                    _META, _AS_STRIDED.redispatch(_META, tensor, (8,), (1,), 0), out.dtype
                )
            return _AS_STRIDED.redispatch(
                _META, base, tuple(out.shape), out.stride(), out.storage_offset()
            )
    return _new(out)


def _convolution(*args: Any) -> Any:
    """`convolution_overrideable` has no CPU kernel; the plain one takes the same arguments."""
    return _run(torch.ops.aten.convolution.default, *args)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    bias_sizes = [weight.shape[0]]
    return _run(torch.ops.aten.convolution_backward.default, grad, x, weight, bias_sizes, *rest)


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _new(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _new(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not Clock.paused:
        _tick(torch.ops.aten.add_.Tensor, [source, target])
    if observer is not None and not observer.copy(source, target, not non_blocking):
        return target
    (_values(target) if _on_sim(target) else target).copy_(
        _values(source) if _on_sim(source) else source
    )
    return target


_fallbacks = torch.library.Library("_", "IMPL")
_fallbacks.fallback(_run, "PrivateUse1")
_kernels = torch.library.Library("aten", "IMPL")
_kernels.impl("empty.memory_format", _empty, "PrivateUse1")
_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
_kernels.impl("convolution_overrideable", _convolution, "PrivateUse1")
_kernels.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")
_kernels.impl("_has_compatible_shallow_copy_type", lambda a, b: True, "PrivateUse1")
