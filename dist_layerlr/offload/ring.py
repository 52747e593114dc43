"""Decide which unit is in which slot, and which goes next. A state machine without torch.

Units are visited forward, then backward (the echo): 0 .. N-1, N-1 .. 0. The one whose next use on
that path lies farthest ahead gives up its slot. The path only decides what is fast; any unit may be
needed at any time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Where a unit is.

    HOST -> LOADING -> READY -> HOST, and LOADING -> HOST for one that is not wanted any more.
    """

    HOST = "host"
    """It holds no slot."""
    LOADING = "loading"
    """It holds a slot, and its copy was asked for; compute was not made to wait for it yet."""
    READY = "ready"
    """It holds a slot that compute may read."""


@dataclass(frozen=True, slots=True)
class Load:
    """A copy to be made. Whatever held the slot has left it."""

    unit: int
    slot: int


class RingFull(RuntimeError):
    """Every slot holds something that may not leave."""


class Ring:
    """A fixed number of slots for more units."""

    def __init__(self, *, units: int, slots: int, window: int):
        self._slot: dict[int, int] = {}
        """{unit: slot} of the units that hold one."""
        self._holder: list[int | None] = [None] * slots
        """The unit in each slot."""
        self._state = [State.HOST] * units
        self._empty = list(range(slots))
        self._window = window
        self.slots = slots
        self.peak = 0
        """Most units that held a slot at a time."""
        self.reorder(range(units))

    def reorder(self, order: Iterable[int]) -> None:
        """Set the forward order: a permutation of the units."""
        self._order: Sequence[int] = list(order)
        self._place = {unit: i for i, unit in enumerate(self._order)}
        assert len(self._place) == len(self._state) == len(self._order)

    def state(self, unit: int) -> State:
        """Where the unit is."""
        return self._state[unit]

    def slot(self, unit: int) -> int:
        """The slot of a unit that is not on the host."""
        return self._slot[unit]

    def follows(self, before: int, unit: int) -> bool:
        """Whether ``unit`` comes right behind ``before`` in forward order."""
        return self._place[unit] == self._place[before] + 1

    def unit_in(self, slot: int) -> int | None:
        """The unit that holds a slot; None: nobody does."""
        return self._holder[slot]

    @property
    def order(self) -> tuple[int, ...]:
        """Units in forward order."""
        return tuple(self._order)

    def holders(self) -> list[int]:
        """Units that hold a slot."""
        return list(self._slot)

    def need(self, unit: int, *, backward: bool, busy: Container[int] = ()) -> list[Load]:
        """Plan the loads that bring ``unit`` and the next ones of its direction into slots.

        Args:
            unit: the one that is computed next.
            backward: the direction.
            busy: units that may not leave their slots.

        Raises:
            RingFull: ``unit`` finds no slot.
        """
        ahead = self._ahead(unit, backward)
        loads: list[Load] = []
        for wanted in (unit, *ahead):
            if self._state[wanted] is State.HOST:
                slot = self._make_room(unit, {unit, *ahead}, backward, busy)
                # The unit itself comes before all others: it may take the slot of one that the
                # window wants. Those that are fetched ahead take what is left, or wait.
                if slot is None and wanted == unit:
                    slot = self._make_room(unit, {unit}, backward, busy)
                    if slot is None:
                        raise RingFull
                if slot is None:
                    break
                loads.append(self._load(wanted, slot))
        return loads

    def arrived(self, unit: int) -> None:
        """LOADING -> READY."""
        assert self._state[unit] is State.LOADING, f"unit {unit} arrived while {self._state[unit]}"
        self._state[unit] = State.READY

    def drop(self, unit: int) -> None:
        """Give up the unit's slot: LOADING or READY -> HOST."""
        assert self._state[unit] is not State.HOST, f"unit {unit} holds no slot"
        self._state[unit] = State.HOST
        slot = self._slot.pop(unit)
        self._holder[slot] = None
        self._empty.append(slot)

    def set_aside(self, unit: int) -> int:
        """Give up the unit's slot, which no other unit may take until ``take_back``.

        Returns:
            the slot.
        """
        self.drop(unit)
        return self._empty.pop()

    def take_back(self, slot: int) -> None:
        """A slot that was set aside may be taken again."""
        self._empty.append(slot)

    def _ahead(self, unit: int, backward: bool) -> list[int]:
        """The units that are fetched while this one is computed, nearest first."""
        place, step = self._place[unit], -1 if backward else 1
        places = (place + step * i for i in range(1, self._window + 1))
        return [self._order[p] for p in places if 0 <= p < len(self._order)]

    def _load(self, unit: int, slot: int) -> Load:
        self._state[unit] = State.LOADING
        self._slot[unit] = slot
        self._holder[slot] = unit
        self._empty.remove(slot)
        self.peak = max(self.peak, len(self._slot))
        return Load(unit, slot)

    def _make_room(
        self, current: int, keep: Container[int], backward: bool, busy: Container[int]
    ) -> int | None:
        """Find an empty slot, or empty one whose unit may leave; None: there is no such unit."""
        # An empty slot is taken first: no unit loses a copy for it.
        if not self._empty:
            victims = [u for u in self._slot if u not in keep and u not in busy]
            if not victims:
                return None
            self.drop(max(victims, key=lambda u: self._distance(current, u, backward)))
        return self._empty[-1]

    def _distance(self, current: int, unit: int, backward: bool) -> int:
        """Units visited until the next use of ``unit`` on the echo path."""
        # One on the way is met directly. Any other is met after the turn: at the first unit in
        # backward, at the last one in forward.
        here, there, last = self._place[current], self._place[unit], len(self._order) - 1
        if backward:
            return here - there if there < here else here + there
        return there - here if there > here else (last - here) + (last - there)
