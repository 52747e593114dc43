"""What autograd saves for backward during a unit's forward.

A saved view of a slot would keep the slot for the whole graph, and would be overwritten when the
slot is used again. So it is replaced by a description (``SavedView``); when backward asks for it,
the unit is fetched again and the view is made anew. Everything else is saved as it would be without
streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.copies import DeviceCopies
from dist_layerlr.offload.internals import outer_saved_hooks
from dist_layerlr.offload.masters import Unit
from dist_layerlr.offload.reach import Reach
from dist_layerlr.offload.transfer import Slot

_Pack: TypeAlias = Callable[[Tensor], Any]
_Unpack: TypeAlias = Callable[[Any], Tensor]


class SavedView(NamedTuple):
    """What autograd keeps in place of a tensor in a slot."""

    unit: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    conjugate: bool
    negative: bool
    edition: int
    """Of the unit's weights when it was saved."""
    leaf: Any
    """The node that is to accumulate the gradient, where the tensor is a weight that trains."""

    def view_in(self, slot: Slot) -> Tensor:
        """The tensor that was saved, as a view of a slot."""
        memory = slot.typed.get(self.dtype)
        if memory is None:  # the model took a view of a weight in another dtype
            memory = slot.memory.view(self.dtype)
        view = memory.as_strided(self.shape, self.stride, self.offset)
        if not (self.conjugate or self.negative):
            return view
        # A view of the slot has neither of these two bits, which say that the values are to be
        # conjugated or negated when they are read.
        view = view.conj() if self.conjugate else view
        return view.neg() if self.negative else view


class _PackedOutside(NamedTuple):
    """What the saved-tensor hooks around ours made of a tensor."""

    packed: Any


class SavedTensors:
    """The saved-tensor hooks of every unit whose forward is running."""

    def __init__(
        self, units: Sequence[Unit], copies: DeviceCopies, need: Callable[[int], None]
    ) -> None:
        """Save nothing yet.

        Args:
            units: of the model.
            copies: their copies on the device.
            need: brings a unit to the device and points its parameters there.
        """
        self._units, self._copies, self._need = units, copies, need
        self._running: list[tuple[int, torch.autograd.graph.saved_tensors_hooks | None]] = []
        """(unit, hooks) of each unit whose forward is running; None where nothing is saved."""
        self.reach = Reach(units, copies.across_devices)

    @property
    def running(self) -> int | None:
        """The unit whose forward began last and is running."""
        return self._running[-1][0] if self._running else None

    def enter(self, unit: int) -> None:
        """A unit's forward begins. Nothing is recorded yet."""
        self._running.append((unit, None))

    def record(self) -> None:
        """Replace what autograd saves from now on, until the unit that entered last leaves.

        Only the innermost hooks in force get to see a saved tensor, so ours hand the rest to those
        around them. These may be a checkpoint's. It must see the same tensors in forward and in
        recomputation, and it does: what lies in a slot is kept from it both times. It must also get
        to drop them, or the graph would keep everything that checkpointing is to free.
        """
        pack, unpack = outer_saved_hooks() or (None, None)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            partial(self._pack, pack), partial(self._unpack, unpack)
        )
        # Entered by hand: the forward runs between two module hooks, which no ``with`` can span.
        hooks.__enter__()
        self._running[-1] = self._running[-1][0], hooks

    def leave(self) -> int:
        """The forward of the unit that entered last has ended, or failed: which it was."""
        unit, hooks = self._running.pop()
        if hooks is not None:
            hooks.__exit__()
        return unit

    def _pack(self, outer: _Pack | None, tensor: Tensor) -> Any:
        index = self._copies.unit_behind(tensor)
        if index is None:
            return tensor if outer is None else _PackedOutside(outer(tensor))
        # By position: this runs for each weight of each forward.
        return SavedView(
            index,
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.is_conj(),
            tensor.is_neg(),
            self._units[index].edition,
            self.reach.leaf(index, tensor) if self.reach.asks else None,
        )

    def _unpack(self, outer: _Unpack | None, saved: Any) -> Tensor:
        if not isinstance(saved, SavedView):
            if isinstance(saved, _PackedOutside):
                assert outer is not None
                return outer(saved.packed)
            as_it_was: Tensor = saved
            return as_it_was
        if self._copies.closed:
            raise OffloadError(
                "backward() needs streamed weights, but their handle was removed. Run it before"
                " remove()."
            )
        self._need(saved.unit)
        if saved.leaf is not None:
            self.reach.read(saved.leaf)
        unit = self._units[saved.unit]
        # Autograd compares the versions of tensors that it saved itself; here that falls to us.
        if unit.edition != saved.edition:
            raise OffloadError(
                f"Weights of {unit.name} were changed in place between forward and backward. "
                "Step the optimizer after the last backward of a forward."
            )
        return saved.view_in(self._copies.slot_of(saved.unit))
