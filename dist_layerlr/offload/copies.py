"""The copies of units on the device: which slot holds which, whether it arrived, who uses it.

The ring decides which unit goes into which slot, and the fetcher copies. This module joins the two
to slots of device memory, and knows when a copy is outdated or its slot still in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend, Event
from dist_layerlr.offload.internals import storage_key, storage_uses, uses_of
from dist_layerlr.offload.masters import Unit
from dist_layerlr.offload.meter import WAIT
from dist_layerlr.offload.ring import Load, Ring, RingFull, State
from dist_layerlr.offload.transfer import Fetcher, Slot


class DeviceCopies:
    """Copies of units in the slots of one ring."""

    def __init__(
        self,
        units: Sequence[Unit],
        ring: Ring,
        slots: Sequence[Slot],
        fetcher: Fetcher,
        backend: Backend,
    ):
        self.ring, self.fetcher = ring, fetcher
        self._units, self._slots, self._backend = units, slots, backend
        self._keys = [storage_key(slot.memory) for slot in slots]
        self._slot_index = {key: i for i, key in enumerate(self._keys)}
        # Counted before any parameter points at a slot: more uses than these, and than the views
        # that the slot keeps, are somebody else's.
        self._own_uses = [storage_uses(slot.memory) for slot in slots]
        self._ready: dict[int, Event] = {}
        """{unit: event of its copy}, from the fetch until it is known to be over."""
        self._stamps: dict[int, tuple[int, ...]] = {}
        """{unit: stamp of its masters when its copy was asked for}."""
        self._at_rest: dict[int, tuple[int, ...]] = {}
        """{unit: closer stamp of its masters when a pass ended} of copies that outlive the pass."""
        self._aside: dict[int, str] = {}
        """{slot: name of the unit whose weights it held} of slots that somebody still refers to,
        though their copies are worth nothing."""

    @property
    def across_devices(self) -> bool:
        """Whether a weight that is fetched changes its device."""
        return self._backend.device.type != "cpu"

    @property
    def closed(self) -> bool:
        """Whether the slots were given up."""
        return not self._slots

    def slot_of(self, unit: int) -> Slot:
        """The slot of a unit that holds one."""
        return self._slots[self.ring.slot(unit)]

    def views(self, unit: int) -> list[Tensor]:
        """The views of its slot that the parameters of a unit point at while it is there."""
        index = self.ring.slot(unit)
        slot = self._slots[index]
        made = slot.views.get(unit)
        if made is None:
            # Made once: a unit comes to the same few slots again and again.
            made = [m.view_in(slot.typed[m.dtype]) for m in self._units[unit].masters]
            slot.views[unit] = made
            self._own_uses[index] += len(made)
        return made

    def unit_behind(self, tensor: Tensor) -> int | None:
        """The unit whose slot a tensor lies in; None: it lies elsewhere.

        Raises:
            OffloadError: the unit has left the slot.
        """
        if tensor.layout is not torch.strided:  # only strided tensors have a storage
            return None
        slot = self._slot_index.get(storage_key(tensor))
        if slot is None:
            return None
        unit = self.ring.unit_in(slot)
        if unit is None:
            raise OffloadError(
                f"A view of a weight of {self._aside.get(slot, 'a streamed unit')} was kept from an"
                " earlier pass and is used in this one. Take it anew in each forward, or clone it."
            )
        return unit

    def bring(self, unit: int, *, backward: bool) -> Slot:
        """Have a unit in a slot, start the copies of the next ones, and make compute wait for it.

        Args:
            unit: the one that is computed next.
            backward: whether the next ones are those in front of it in forward order.

        A copy that fails leaves its unit on the host, to be fetched anew.

        Raises:
            OffloadError: every slot holds something that is still in use.
        """
        self._take_back_slots()
        try:
            loads = self.ring.need(unit, backward=backward, busy=self.in_use_elsewhere())
        except RingFull:
            self._refuse_full(unit)
        for position, load in enumerate(loads):
            try:
                self._start(load)
            except BaseException:
                # None of the copies that are left was started: their units hold no slot.
                for lost in loads[position:]:
                    self.ring.drop(lost.unit)
                raise
        self._wait_for(unit)
        return self.slot_of(unit)

    def _wait_for(self, unit: int) -> None:
        """Make compute wait for a unit's copy, if it may still run."""
        fetch = self._ready.get(unit)
        if fetch is None:
            return
        first = self.ring.state(unit) is State.LOADING
        # Point 1 of [Note: stream order]. Compute waits, the host does not, and only for this
        # unit: the copies behind it go on beside its kernels.
        try:
            ready = self.fetcher.queued(fetch)
            reached = self._backend.wait(ready)
        except BaseException:
            if first:
                del self._ready[unit]
                self.ring.drop(unit)
            raise
        if reached is None:
            del self._ready[unit]
        if first:
            self.ring.arrived(unit)
            if reached is not None:
                self.fetcher.meter.add(WAIT, self._units[unit].name, (reached, ready))

    def _start(self, load: Load) -> None:
        # An event is left here if the unit lost its slot unused. Should this fetch fail, that event
        # must not be taken for its own.
        self._ready.pop(load.unit, None)
        # The stamp comes before the copy: a write during it must make the copy outdated.
        unit = self._units[load.unit]
        self._stamps[load.unit] = unit.stamp(unit.versions())
        self._ready[load.unit] = self.fetcher.fetch(unit, self._slots[load.slot])

    def release(self, unit: int) -> None:
        """Note that compute is done with a unit for now. Its copy stays until the slot is taken."""
        # Point 2 of [Note: stream order]: whoever still refers to the slot may use it after this
        # point, so the event is then recorded when the slot is taken.
        index = self.ring.slot(unit)
        slot = self._slots[index]
        slot.free = None if self._is_shared(index) else self._backend.mark(slot.free)

    def drop_outdated(self, unit: int, versions: tuple[int, ...]) -> None:
        """Give up a unit's copy if its masters, whose versions are these, were written to since."""
        if self.ring.state(unit) is State.HOST:
            return
        if self._stamps[unit] != self._units[unit].stamp(versions):
            self._drop([unit])

    def rest(self) -> None:
        """A pass has ended: the caller may write to masters until the next one begins."""
        self._at_rest = {unit: self._units[unit].rest_stamp() for unit in self.ring.holders()}

    def wake(self) -> None:
        """A pass begins: give up copies whose masters were written to meanwhile."""
        rested, self._at_rest = self._at_rest, {}
        holders = set(self.ring.holders()) & rested.keys()
        self._drop([u for u in sorted(holders) if self._units[u].rest_stamp() != rested[u]])

    def drop_trained(self) -> None:
        """Give up the copies of units that train.

        The optimizer is about to change their masters, maybe through ``.data``, which no version
        counter sees.
        """
        self._drop([unit for unit in self.ring.holders() if self._units[unit].trained])

    def _drop(self, units: list[int]) -> None:
        """Give up copies. A slot that a kept view shows goes to no other unit while it does."""
        kept = self.in_use_elsewhere() if units else set()
        for unit in units:
            if unit in kept:
                slot = self.ring.set_aside(unit)
                # Used until it is taken back, so the event is recorded when it is taken again.
                self._slots[slot].free = None
                self._aside[slot] = self._units[unit].name
            else:
                self.ring.drop(unit)

    def _take_back_slots(self) -> None:
        for slot in list(self._aside):
            if not self._is_shared(slot):
                del self._aside[slot]
                self.ring.take_back(slot)

    def _is_shared(self, slot: int) -> bool:
        return uses_of(self._keys[slot]) > self._own_uses[slot]

    def in_use_elsewhere(self) -> set[int]:
        """Units whose slot somebody else refers to.

        That is a view that was kept, or an exception that still holds its frames.
        """
        found = set()
        for unit in self.ring.holders():
            # A slot that is being filled is referred to by its copy.
            if self.ring.state(unit) is State.READY and self._is_shared(self.ring.slot(unit)):
                found.add(unit)
        return found

    def close(self) -> None:
        """Finish all copies and let go of the device memory."""
        self.fetcher.close()
        # Graphs that are alive refer to this object; the memory must not wait for them.
        self._slots = ()

    def _refuse_full(self, unit: int) -> NoReturn:
        names = [self._units[u].name for u in sorted(self.in_use_elsewhere())]
        held = ", ".join(dict.fromkeys([*names, *self._aside.values()]))
        raise OffloadError(
            f"No slot for {self._units[unit].name}: views of the weights of {held} are still held,"
            " by code that kept them (clone what is to be kept), by saved-tensor hooks inside a"
            " block, or by a graph of create_graph=True (raise prefetch_window, or run that pass"
            " before stream())."
        )
