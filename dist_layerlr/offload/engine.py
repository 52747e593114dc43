"""When a unit is fetched, when its parameters point at it, and when they point at the host again.

A unit is *needed* by its forward (recomputation is one, too), by the forward of a module inside it
that owns streamed weights (a block may checkpoint a part of itself), and by backward when autograd
asks for a weight that was saved. Then it is brought to a slot and its parameters point there: it is
the *current* unit. It stays current until another unit is needed or the pass ends, and its copy
stays in the slot until the ring gives the slot to another unit. No hook of its own could release
it: under non-reentrant checkpointing recomputation stops before forward returns, and a full
backward hook fires before autograd has read all saved weights.

Between passes no unit is current: all parameters are plain host tensors, which the caller may
write. ``passes.py`` has the table of passes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.copies import DeviceCopies
from dist_layerlr.offload.device import Backend
from dist_layerlr.offload.gradients import GradSink
from dist_layerlr.offload.internals import at_end_of_backward, graph_task
from dist_layerlr.offload.masters import Unit
from dist_layerlr.offload.passes import TRANSITIONS, Pass, Trigger
from dist_layerlr.offload.ring import Ring
from dist_layerlr.offload.saved import SavedTensors
from dist_layerlr.offload.transfer import Fetcher, Slot
from dist_layerlr.offload.validate import (
    check_autocast,
    check_masters,
    check_process,
    check_transform,
)


class _EndOfBackward:
    """A callable that the autograd engine calls, or releases uncalled when the pass fails."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def __call__(self) -> None:
        self._call()


class Engine:
    """Fetches the units of one streamed model when they are needed."""

    def __init__(
        self,
        units: Sequence[Unit],
        ring: Ring,
        slots: Sequence[Slot],
        fetcher: Fetcher,
        backend: Backend,
    ):
        self.units = units
        self.copies = DeviceCopies(units, ring, slots, fetcher, backend)
        self.saved = SavedTensors(units, self.copies, self.need)
        self._device_type = backend.device.type
        self._pass = Pass.OUTSIDE
        self._process = os.getpid()
        self._thread = 0
        """Which thread runs the model's forward, or ran the last one."""
        self._current: int | None = None
        """The unit whose parameters point at the device."""
        self._versions_on_arrival: tuple[int, ...] = ()
        """Versions of the current unit's weights when they were pointed at the device."""
        self._last = 0
        """The unit that was needed last."""
        self._first_order: list[int] | None = []
        """Units in the order of the first forward; None once the ring knows it."""
        self._end_call: weakref.ref[_EndOfBackward] | None = None
        """The callback that waits for the end of this backward pass. Autograd owns it."""
        self._unsettled = False
        """Whether a backward pass failed whose gradients wait for ``recover``."""
        # Autograd's device threads unpack saved tensors while the caller's thread may run forwards.
        # Reentrant, because a trigger inside ``need`` comes back here.
        self._lock = threading.RLock()
        trained = {m.weight.param: u for u in units for m in u.masters if m.trainable}
        self.sink = GradSink(backend, trained, self._begin_backward)
        self._unit_of = {id(param): unit for param, unit in trained.items()}
        """{id of a streamed parameter that trains: its unit}."""

    def hook(
        self, model: nn.Module, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterable[RemovableHandle]:
        """Register all triggers. ``before`` and ``after`` run around each forward of the model."""
        # In front of the caller's own pre-hooks, which may read weights; with always_call behind
        # the forward, so that an exception in it leaves the parameters on the host, too.
        self.saved.reach.watch(model)
        yield model.register_forward_pre_hook(partial(self._begin_forward, before), prepend=True)
        yield model.register_forward_hook(partial(self._end_forward, after), always_call=True)
        for index, unit in enumerate(self.units):
            yield unit.module.register_forward_pre_hook(
                partial(self._enter_unit, index), prepend=True
            )
            yield unit.module.register_forward_hook(self._leave_unit, always_call=True)
            owners = {id(m.weight.owner): m.weight.owner for m in unit.masters}
            owners.pop(id(unit.module), None)  # has its hooks already
            for owner in owners.values():
                yield owner.register_forward_pre_hook(
                    partial(self._enter_owner, index), prepend=True
                )
                yield owner.register_forward_hook(self._leave_owner, always_call=True)
        # torch keeps this hook in a global list, which must not keep the model alive.
        yield register_optimizer_step_pre_hook(partial(_announce_step, weakref.ref(self)))

    def need(self, index: int) -> None:
        """Bring a unit to the device and point its parameters at it.

        Raises:
            OffloadError: a parameter was moved or replaced, or no slot can be freed.
        """
        with self._lock:
            backward = graph_task() != -1
            if backward:
                self._begin_backward()
            if index == self._current:
                return
            check_process(self._process)
            check_transform(self.units[index].name)
            # Before anything of this unit: the event that frees the slot of the one before must lie
            # in front of the first kernel that this one adds to the stream.
            self.point_at_host()
            check_masters(self.units[index].masters)
            if not backward and not self._pass.in_forward:
                # A unit without its model, a pass of its own: as at the begin of a forward.
                self._refuse_unsettled()
                self._begin_pass()
            self.copies.drop_outdated(index)
            # Recomputation of a region of several units goes forward inside backward: there the
            # unit behind the last one is needed, and the next ones lie behind it.
            recomputes_region = self.copies.ring.follows(self._last, index)
            slot = self.copies.bring(index, backward=backward and not recomputes_region)
            self._point_at(index, slot)
            if not backward and self._first_order is not None and index not in self._first_order:
                self._first_order.append(index)

    def point_at_host(self) -> None:
        """Point the current unit's parameters back at the host. Its copy stays in the slot.

        Raises:
            OffloadError: somebody wrote to them meanwhile; the host has not seen it.
        """
        if self._current is None:
            return
        index, self._current = self._current, None
        # First the parameters, which refer to the slot, then the look at who else refers to it.
        for master in self.units[index].masters:
            master.weight.param.data = master.host
        self.copies.release(index)
        if self.units[index].versions() != self._versions_on_arrival:
            raise OffloadError(
                f"Weights of {self.units[index].name} were written to during a forward or backward"
                " pass, which would be lost. Write between passes; weights that train stay on the"
                " device with stream_trainable=False."
            )

    def finish_backward(self) -> None:
        """End a backward pass, successful or not: all parameters and gradients lie on the host.

        Idempotent.
        """
        with self._lock:
            self._change_pass(Trigger.BACKWARD_ENDS)
            self._end_call, self._unsettled = None, False
            try:
                self.point_at_host()
            finally:
                # The optimizer may step now, so copies of trained weights are worth nothing. The
                # gradients come last: a parameter takes a host gradient only while it is there.
                self._give_back()
                self.copies.rest()
                self.sink.assign_gradients()

    def before_step(self, optimizer: Optimizer) -> None:
        """Some optimizer is about to write weights, maybe these."""
        if graph_task() != -1:
            return  # steps during backward are refused where a gradient arrives
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with self._lock:
            self.copies.fetcher.release_masters()
            units = {id(unit): unit for key, unit in self._unit_of.items() if key in stepped}
            if units:
                self._refuse_unsettled()
            for unit in units.values():
                unit.steps += 1

    def close(self) -> None:
        """Stop. Parameters point at the host afterwards."""
        try:
            self.finish_backward()
        finally:
            self.sink.close()
            self.copies.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: two models would share slots."""
        raise OffloadError(
            "A streamed model cannot be copied or pickled. Save its state_dict(), or call"
            " handle.remove() first."
        )

    # Triggers: what torch calls

    def _begin_forward(self, before: Callable[[], None], module: nn.Module, args: Any) -> None:
        if graph_task() != -1:
            return
        thread = threading.get_ident()
        if self._pass.in_forward and thread != self._thread:
            raise OffloadError(
                "Two threads run the streamed model at once, which has one set of weights on"
                " the device. Give each call its turn (a lock)."
            )
        self._refuse_unsettled()
        self._thread = thread
        self.saved.leave_all()
        # One parameter per unit shows a cast or move of the whole model here, before other code of
        # the forward fails because of it with a message of its own.
        for index, unit in enumerate(self.units):
            if index != self._current:
                check_masters(unit.masters[:1])
        before()
        with self._lock:
            # Nothing current is left but by an interrupted forward.
            self.point_at_host()
            self._begin_pass()
            self._change_pass(Trigger.FORWARD_BEGINS)

    def _end_forward(
        self, after: Callable[[], None], module: nn.Module, args: Any, output: Any
    ) -> None:
        # The second: a refused call of another thread must not end the forward that runs.
        if graph_task() != -1 or threading.get_ident() != self._thread:
            return
        self._change_pass(Trigger.FORWARD_ENDS)
        with self._lock:
            self.point_at_host()
            if not torch.is_grad_enabled():
                # No backward follows, so the optimizer may step before the next trigger.
                self._give_back()
            self.copies.rest()
            self._tell_ring_the_order()
        after()

    def _enter_unit(self, index: int, module: nn.Module, args: Any) -> None:
        # A hook that torch.compile traces cannot fetch: copies and events are no graph's business.
        if torch.compiler.is_compiling():
            return
        # First, because _leave_unit runs even if what follows raises.
        self.saved.enter()
        unit = self.units[index]
        check_autocast(self._device_type, unit.name, unit.trained)
        self.need(index)
        if torch.is_grad_enabled():
            self.saved.record()

    def _leave_unit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.saved.leave()
        if graph_task() == -1 and not self._pass.in_forward:
            # The unit was called without its model: nobody else ends this pass.
            self._end_without_model()

    def _enter_owner(self, index: int, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.need(index)

    def _leave_owner(self, module: nn.Module, args: Any, output: Any) -> None:
        """Leave the weights on the host, too, after a module inside a unit was called alone."""
        if torch.compiler.is_compiling() or self.saved.in_unit:
            return
        if graph_task() == -1 and not self._pass.in_forward:
            self._end_without_model()

    def _end_without_model(self) -> None:
        with self._lock:
            self.point_at_host()
            if not torch.is_grad_enabled():
                self._give_back()
            self.copies.rest()

    def _begin_backward(self) -> None:
        """Ask autograd to call back when this pass ends.

        Under reentrant checkpointing the first trigger lies in the outermost pass, and so the
        callback does.
        """
        with self._lock:
            if self._pass.in_backward:
                if self._unsettled:
                    self._refuse_unsettled()
                return
            self._change_pass(Trigger.BACKWARD_BEGINS)
            self.copies.wake()
            self.saved.reach.begin()
            call = _EndOfBackward(self._succeed_backward)
            # Autograd gets the only reference. It calls the callback if the pass succeeds; if the
            # pass fails it drops it uncalled.
            self._end_call = weakref.ref(call, self._fail_backward)
            at_end_of_backward(call)

    def _succeed_backward(self) -> None:
        self.finish_backward()
        self.saved.reach.check()

    def _fail_backward(self, end: weakref.ref[_EndOfBackward]) -> None:
        """Autograd dropped the callback of a pass uncalled."""
        with self._lock:
            if end is not self._end_call:
                return  # settled meanwhile
            if self._device_type == "cpu":
                # The caller's own thread ran the pass: it has not seen the exception yet.
                self.finish_backward()
            else:
                self._abandon_backward()

    # State

    def _begin_pass(self) -> None:
        """Begin with no copy that the caller has outdated."""
        # Behind a forward that had no backward, the weights may have been stepped.
        self.copies.drop_trained()
        self.copies.wake()

    def _give_back(self) -> None:
        """End a pass behind which the caller may write to the weights."""
        self.copies.drop_trained()
        self.copies.fetcher.release_masters()

    def _abandon_backward(self) -> None:
        """End a backward pass of which the caller may have seen the exception already.

        A device's thread may drop the pass after the caller went on. Nobody knows then whether he
        took away the gradients, zeroed in the meantime, so they wait for ``recover``.
        """
        if not self.sink.holds_gradients:
            self.finish_backward()
            return
        self._unsettled = True
        self.point_at_host()
        self._give_back()

    def _refuse_unsettled(self) -> None:
        """Refuse to go on behind a failed backward pass whose gradients are not settled."""
        with self._lock:
            if self._pass.in_backward and not self._unsettled:
                self._abandon_backward()  # its callback is still to come, and will do nothing
            if self._unsettled:
                raise OffloadError(
                    "A backward pass through the streamed model failed, and its gradients are not"
                    " settled. Where the exception is caught call handle.recover(), and"
                    " zero_grad() behind it."
                )

    def _change_pass(self, trigger: Trigger) -> None:
        with self._lock:
            key = self._pass, trigger
            assert key in TRANSITIONS, f"{trigger.value} while {self._pass.value}"
            self._pass = TRANSITIONS[key]

    def _point_at(self, index: int, slot: Slot) -> None:
        """Make a unit the current one."""
        unit = self.units[index]
        for master in unit.masters:
            # .data keeps the Parameter object, and with it the optimizer's groups and state.
            master.weight.param.data = master.view_in(slot.typed[master.dtype])
        self._current = self._last = index
        self._versions_on_arrival = unit.versions()

    def _tell_ring_the_order(self) -> None:
        if self._first_order:
            unseen = set(range(len(self.units))) - set(self._first_order)
            self.copies.ring.reorder([*self._first_order, *sorted(unseen)])
            self._first_order = None


def _announce_step(
    engine: weakref.ref[Engine], optimizer: Optimizer, args: Any, kwargs: Any
) -> None:
    live = engine()
    if live is not None:
        live.before_step(optimizer)
