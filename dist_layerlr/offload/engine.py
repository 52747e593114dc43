"""When a unit is fetched, when its parameters point at it, and when it leaves.

A unit is *needed* by its forward (recomputation is one too), by the forward of a module inside it
that owns streamed weights (a block may checkpoint a part of itself), and by backward when autograd
asks for a weight that was saved. It stays until another unit is needed: hooks behind its forward or
backward fire too early to let it go (recomputation stops before the forward's end, and backward
hooks before the last use). Parameters point at the device only while their unit is the current one
inside a forward or backward pass; between passes all of them are plain host tensors.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend
from dist_layerlr.offload.gradients import GradSink
from dist_layerlr.offload.internals import (
    at_end_of_backward,
    graph_task,
    in_grad_transform,
    outer_saved_hooks,
    storage_key,
    storage_uses,
)
from dist_layerlr.offload.masters import Piece, Unit
from dist_layerlr.offload.ring import Ring, RingFull, State
from dist_layerlr.offload.transfer import Fetcher, Slot
from dist_layerlr.offload.validate import check_autocast


class _Saved(NamedTuple):
    """What autograd keeps in place of a tensor in a slot."""

    unit: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    conjugate: bool
    negative: bool
    versions: tuple[int, ...]


class _Foreign(NamedTuple):
    """What hooks around ours made of a tensor."""

    packed: Any


class _EndOfBackward:
    """Called by the autograd engine; released uncalled when the pass fails."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def __call__(self) -> None:
        self._call()


class Engine:
    """The triggers of one streamed model."""

    def __init__(
        self,
        units: Sequence[Unit],
        ring: Ring,
        slots: Sequence[Slot],
        fetcher: Fetcher,
        backend: Backend,
    ):
        self.units, self.ring, self.fetcher = units, ring, fetcher
        self.stalls = 0
        self._slots, self._backend = slots, backend
        self._slot_index = {storage_key(slot.memory): i for i, slot in enumerate(slots)}
        self._own_uses = [storage_uses(slot.memory) for slot in slots]
        self._ready: dict[int, Any] = {}
        self._stamps: dict[int, tuple[int, ...]] = {}
        self._current: int | None = None
        """The unit whose parameters point at the device."""
        self._arrived: tuple[int, ...] = ()
        """Versions of its weights when they came."""
        self._last = 0
        """The unit that was needed last."""
        self._inside = False
        """Whether a forward of the whole model is running."""
        self._thread = 0
        """Which thread runs it, or ran the last one."""
        self._traced: list[int] | None = []
        """Units in the order of the first forward; None once that is known."""
        self._saving: list[torch.autograd.graph.saved_tensors_hooks | None] = []
        """One entry per unit whose forward is running; None where nothing is saved."""
        self._ending: weakref.ref[_EndOfBackward] | None = None
        self._lock = threading.RLock()
        self.sink = GradSink(
            backend,
            (p.weight.param for u in units for p in u.pieces if p.trainable),
            self._enter_backward,
        )

    def hook(
        self, model: nn.Module, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterable[RemovableHandle]:
        """Register all triggers. ``before`` and ``after`` run around each forward of the model."""
        yield model.register_forward_pre_hook(partial(self._begin, before), prepend=True)
        yield model.register_forward_hook(partial(self._end, after), always_call=True)
        for index, unit in enumerate(self.units):
            yield unit.module.register_forward_pre_hook(
                partial(self._enter_unit, index), prepend=True
            )
            yield unit.module.register_forward_hook(
                partial(self._leave_unit, index), always_call=True
            )
            owners = {id(p.weight.owner): p.weight.owner for p in unit.pieces}
            for owner in owners.values():
                if owner is not unit.module:
                    yield owner.register_forward_pre_hook(
                        partial(self._enter_part, index), prepend=True
                    )
                    yield owner.register_forward_hook(self._leave_part, always_call=True)

    def need(self, index: int) -> None:
        """Bring a unit to the device and point its parameters at it.

        Raises:
            OffloadError: a parameter was moved or replaced, or no slot can be freed.
        """
        with self._lock:
            backward = graph_task() != -1
            if backward:
                self._enter_backward()
            if index == self._current:
                return
            if in_grad_transform():
                raise OffloadError(
                    f"Unit {self.units[index].name} cannot be fetched inside torch.func.grad, vjp"
                    " or jvp, which allow no copies into memory of others. Use"
                    " torch.autograd.grad, or torch.autograd.forward_ad."
                )
            self.rest()
            self._check(index, self.units[index].pieces)
            self._discard_stale(index)
            # Recomputation of a region of several units goes forward inside backward.
            upward = self.ring.follows(self._last, index)
            try:
                loads = self.ring.need(
                    index, backward=backward and not upward, busy=self._referred()
                )
            except RingFull:
                self._raise_full(index)
            for load in loads:
                self._stamps[load.unit] = self.units[load.unit].stamp()
                self._ready[load.unit] = self.fetcher.fetch(
                    self.units[load.unit], self._slots[load.slot]
                )
            if self.ring.state(index) is State.LOADING:
                late = self.fetcher.wait(self._ready.pop(index))
                self.stalls += late or any(load.unit == index for load in loads)
                self.ring.arrived(index)
            slot = self._slots[self.ring.slot(index)]
            for piece in self.units[index].pieces:
                piece.weight.param.data = piece.on(slot.typed[piece.dtype])
            self._current = self._last = index
            self._arrived = self.units[index].versions()
            if self._traced is not None and not backward and index not in self._traced:
                self._traced.append(index)

    def rest(self) -> None:
        """Point the current unit's parameters back at the host. Its copy stays in the slot.

        Raises:
            OffloadError: somebody wrote to them meanwhile; the host has not seen it.
        """
        if self._current is None:
            return
        index, self._current = self._current, None
        for piece in self.units[index].pieces:
            piece.weight.param.data = piece.host
        slot = self._slots[self.ring.slot(index)]
        # Point 2 of [Note: stream order]: whoever still refers to the slot may use it after this
        # point.
        slot.free = None if index in self._referred() else self._backend.mark()
        if self.units[index].versions() != self._arrived:
            raise OffloadError(
                f"Weights of {self.units[index].name} were written to during a forward or backward"
                " pass, which would be lost. Write between passes; weights that train stay on the"
                " device with stream_trainable=False."
            )

    def forget_trainable(self) -> None:
        """Give up copies whose masters the optimizer is about to change, maybe through
        ``.data``.
        """
        for unit in self.ring.holders():
            if self.units[unit].trained:
                self.ring.drop(unit)

    def settle(self) -> None:
        """End of a backward pass, successful or not: gradients to their parameters, everything on
        the host. Idempotent.
        """
        with self._lock:
            self._ending = None
            try:
                self.rest()
            finally:
                self.forget_trainable()
                self.sink.settle()

    def close(self) -> None:
        """Stop. Parameters point at the host afterwards."""
        try:
            self.settle()
        finally:
            self.sink.close()
            self.fetcher.close()
            self._slots = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: two models would share slots."""
        raise OffloadError(
            "A streamed model cannot be copied or pickled. Save its state_dict(), or call"
            " handle.remove() first."
        )

    # Triggers

    def _begin(self, before: Callable[[], None], module: nn.Module, args: Any) -> None:
        if graph_task() == -1:
            thread = threading.get_ident()
            if self._inside and thread != self._thread:
                raise OffloadError(
                    "Two threads run the streamed model at once, which has one set of weights on"
                    " the device. Give each call its turn (a lock)."
                )
            self._thread = thread
            while self._saving:  # left by a KeyboardInterrupt
                self._stop_saving()
            for index, unit in enumerate(
                self.units
            ):  # a cast of everything shows before other code trips over it
                self._check(index, unit.pieces[:1])
            before()
            self._inside = True

    def _end(self, after: Callable[[], None], module: nn.Module, args: Any, output: Any) -> None:
        if graph_task() != -1 or threading.get_ident() != self._thread:
            return
        self._inside = False
        with self._lock:
            self.rest()
            if not torch.is_grad_enabled():
                self.forget_trainable()
            self._learn_order()
        after()

    def _enter_unit(self, index: int, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._saving.append(None)
        unit = self.units[index]
        check_autocast(self._backend.device.type, unit.name, unit.trained)
        self.need(index)
        if torch.is_grad_enabled():
            self._saving[-1] = self._save_handles()

    def _leave_unit(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._stop_saving()
        if graph_task() == -1 and not self._inside:
            with self._lock:
                self.rest()

    def _enter_part(self, index: int, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.need(index)

    def _leave_part(self, module: nn.Module, args: Any, output: Any) -> None:
        """A part that is called alone leaves its weights on the host, too."""
        if (
            not torch.compiler.is_compiling()
            and graph_task() == -1
            and not self._inside
            and not self._saving
        ):
            with self._lock:
                self.rest()

    def _enter_backward(self) -> None:
        """Be told when this pass ends.

        The first trigger under reentrant checkpointing lies in the outermost pass.
        """
        with self._lock:
            if self._ending is not None:
                return
            end = _EndOfBackward(self.settle)
            # Released without a call when the pass fails, before the caller sees the exception.
            self._ending = weakref.ref(end, lambda _: self.settle())
            at_end_of_backward(end)

    # Saved tensors

    def _save_handles(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Save handles in place of slot memory during a unit's forward, and hand the rest to the
        hooks in force.

        Those may be a checkpoint's: it must see the same tensors in forward and recomputation (it
        does: what lies in a slot is kept from it both times) and must get to drop them, or it would
        keep everything.
        """
        pack, unpack = outer_saved_hooks() or (None, None)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            partial(self._pack, pack), partial(self._unpack, unpack)
        )
        hooks.__enter__()
        return hooks

    def _stop_saving(self) -> None:
        hooks = self._saving.pop()
        if hooks is not None:
            hooks.__exit__()

    def _pack(self, outer: Callable[[Tensor], Any] | None, tensor: Tensor) -> Any:
        slot = self._slot_index.get(storage_key(tensor)) if tensor.layout is torch.strided else None
        if slot is None:
            return tensor if outer is None else _Foreign(outer(tensor))
        unit = self.ring.unit_in(slot)
        versions = self.units[unit].versions()
        bits = tensor.is_conj(), tensor.is_neg()
        return _Saved(
            unit,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            *bits,
            versions,
        )

    def _unpack(self, outer: Callable[[Any], Tensor] | None, saved: Any) -> Tensor:
        if isinstance(saved, _Foreign):
            assert outer is not None
            return outer(saved.packed)
        if not isinstance(saved, _Saved):
            result: Tensor = saved
            return result
        if not self._slots:
            raise OffloadError(
                "backward() needs streamed weights, but their handle was removed. Run it before"
                " remove()."
            )
        self.need(saved.unit)
        unit = self.units[saved.unit]
        if unit.versions() != saved.versions:
            raise OffloadError(
                f"Weights of {unit.name} were changed in place between forward and backward. "
                "Step the optimizer after the last backward of a forward."
            )
        slot = self._slots[self.ring.slot(saved.unit)]
        memory = (
            slot.typed[saved.dtype] if saved.dtype in slot.typed else slot.memory.view(saved.dtype)
        )
        view = memory.as_strided(saved.shape, saved.stride, saved.offset)
        view = view.conj() if saved.conjugate else view
        return view.neg() if saved.negative else view

    # State

    def _referred(self) -> set[int]:
        """Units whose slot is in use by somebody else: a view that was kept, an exception that
        still holds its frames.
        """
        return {
            unit
            for unit in self.ring.holders()
            if self.ring.state(unit) is State.READY  # else it is the copy that refers to it
            and storage_uses(self._slots[self.ring.slot(unit)].memory)
            > self._own_uses[self.ring.slot(unit)]
        }

    def _discard_stale(self, index: int) -> None:
        """A copy whose master was written to since is of no use."""
        if (
            self.ring.state(index) is not State.HOST
            and self._stamps[index] != self.units[index].stamp()
        ):
            self.ring.drop(index)

    def _check(self, index: int, pieces: Sequence[Piece]) -> None:
        if index == self._current:
            return
        for piece in pieces:
            problem = _problem(piece)
            if problem:
                raise OffloadError(
                    f"Parameter {piece.name} {problem} after stream(). Call handle.remove() first, "
                    "change the model, and stream again."
                )

    def _raise_full(self, index: int) -> NoReturn:
        held = ", ".join(self.units[u].name for u in sorted(self._referred()))
        raise OffloadError(
            f"No slot for {self.units[index].name}: views of the weights of {held} are still held,"
            " by code that kept them (clone what is to be kept), by saved-tensor hooks inside a"
            " block, or by a graph of create_graph=True (raise prefetch_window, or run that pass"
            " before stream())."
        )

    def _learn_order(self) -> None:
        if self._traced:
            self.ring.reorder(
                [*self._traced, *(i for i in range(len(self.units)) if i not in set(self._traced))]
            )
            self._traced = None


def _problem(piece: Piece) -> str | None:
    """What a user did to a parameter that is at rest."""
    param = piece.weight.param
    if piece.weight.owner._parameters.get(piece.weight.leaf) is not param:
        return "was replaced (load_state_dict(assign=True), or a swapped module)"
    moved = param.data_ptr() != piece.host.data_ptr() or piece.master.data_ptr() != piece.address
    if moved or param.dtype != piece.dtype:
        return "was moved or cast (.to(), .half(), .share_memory(), ...)"
    if param.requires_grad and not piece.trainable:
        return "was unfrozen"
    return None
