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
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

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
from dist_layerlr.offload.validate import check_masters, check_process, check_transform


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
        self.device_type = backend.device.type
        self._pass = Pass.OUTSIDE
        self._process = os.getpid()
        self._current: int | None = None
        """The unit whose parameters point at the device."""
        self._last = 0
        """The unit that was needed last."""
        self._first_order: list[int] | None = []
        """Units in the order of the first forward; None once the ring knows it."""
        self._end_call: weakref.ref[_EndOfBackward] | None = None
        """The callback that waits for the end of this backward pass. Autograd owns it."""
        self._on_backward: Callable[[], None] = lambda: None
        self._watched = False
        """Whether a backward pass runs whose end will be seen, and no failed one is unsettled."""
        self._unsettled = False
        """Whether a backward pass failed whose gradients wait for ``recover``."""
        # Autograd's device threads unpack saved tensors while the caller's thread may run forwards.
        # Reentrant, because a trigger inside ``need`` comes back here.
        self._lock = threading.RLock()
        trained = {m.weight.param: u for u in units for m in u.masters if m.trainable}
        self._meter = fetcher.meter
        self.sink = GradSink(
            backend, units, self._begin_backward, self._meter, staged=fetcher.limited
        )
        self._unit_of = {id(param): unit for param, unit in trained.items()}
        """{id of a streamed parameter that trains: its unit}."""

    def need(self, index: int) -> None:
        """Bring a unit to the device and point its parameters at it.

        Raises:
            OffloadError: a parameter was moved or replaced, or no slot can be freed.
        """
        backward = graph_task() != -1
        if backward and not self._watched:
            self._begin_backward()
        # Most calls end here, so they take no lock: one for each saved weight.
        if index == self._current:
            return
        with self._lock:
            check_process(self._process)
            check_transform(self.units[index].name)
            # Before anything of this unit: the event that frees the slot of the one before must lie
            # in front of the first kernel that this one adds to the stream.
            self.point_at_host()
            unit = self.units[index]
            # Every unit is looked at whenever it is fetched, so the look that finds nothing is
            # short.
            if not unit.at_rest:
                check_masters(unit.masters)
            if not backward and not self._pass.in_forward:
                # A unit without its model, a pass of its own: as at the begin of a forward.
                self.refuse_unsettled()
                self._begin_pass()
            versions = unit.versions()
            self.copies.drop_outdated(index, versions)
            # Recomputation of a region of several units goes forward inside backward: there the
            # unit behind the last one is needed, and the next ones lie behind it.
            recomputes_region = self.copies.ring.follows(self._last, index)
            self.copies.bring(index, backward=backward and not recomputes_region)
            unit.point_at(self.copies.views(index))
            unit.arrive(versions)
            self._current = self._last = index
            self._meter.enter(unit.name, backward=backward)
            self.saved.reach.visit(index)
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
        unit = self.units[index]
        self._meter.leave()
        # First the parameters, which refer to the slot, then the look at who else refers to it.
        unit.point_at_host()
        self.copies.release(index)
        if unit.written_since_arrival:
            raise OffloadError(
                f"Weights of {unit.name} were written to during a forward or backward"
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
                self.refuse_unsettled()
            for unit in units.values():
                unit.steps += 1

    def close(self) -> None:
        """Stop. Parameters point at the host afterwards."""
        try:
            self.finish_backward()
        finally:
            # This waits for all copies, and so comes before their memory is unlocked.
            self.copies.close()
            self.sink.close()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: two models would share slots."""
        raise OffloadError(
            "A streamed model cannot be copied or pickled. Save its state_dict(), or call"
            " handle.remove() first."
        )

    # Passes

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the whole model is running."""
        return self._pass.in_forward

    def check_rest(self) -> None:
        """Refuse a model that was changed as a whole since its last pass.

        One parameter per unit shows a cast or move here, before other code of the forward fails
        because of it with a message of its own.

        Raises:
            OffloadError: naming the parameter.
        """
        for index, unit in enumerate(self.units):
            if index != self._current:
                check_masters(unit.masters[:1])

    def begin_forward(self) -> None:
        """A forward of the whole model begins."""
        with self._lock:
            # Nothing current is left but by an interrupted forward.
            self.point_at_host()
            self._begin_pass()
            self._change_pass(Trigger.FORWARD_BEGINS)

    def end_forward(self) -> None:
        """A forward of the whole model ends."""
        self._change_pass(Trigger.FORWARD_ENDS)
        self.end_without_model()
        with self._lock:
            self._tell_ring_the_order()

    def end_without_model(self) -> None:
        """A unit ends that was called without its model."""
        with self._lock:
            self.point_at_host()
            if not torch.is_grad_enabled():
                # No backward follows, so the optimizer may step before the next trigger.
                self._give_back()
            self.copies.rest()

    def on_backward(self, call: Callable[[], None]) -> None:
        """Run ``call`` when a backward pass begins, which may take units from a forward."""
        self._on_backward = call

    def _begin_backward(self) -> None:
        """Ask autograd to call back when this pass ends.

        Under reentrant checkpointing the first trigger lies in the outermost pass, and so the
        callback does.
        """
        if self._watched:
            return
        with self._lock:
            if self._pass.in_backward:
                self.refuse_unsettled()
                return
            self._change_pass(Trigger.BACKWARD_BEGINS)
            self._on_backward()
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
            if self.device_type == "cpu":
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
        self._unsettled, self._watched = True, False
        self.point_at_host()
        self._give_back()

    def refuse_unsettled(self) -> None:
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
            self._watched = self._pass.in_backward and not self._unsettled

    def _tell_ring_the_order(self) -> None:
        if self._first_order:
            unseen = set(range(len(self.units))) - set(self._first_order)
            self.copies.ring.reorder([*self._first_order, *sorted(unseen)])
            self._first_order = None
