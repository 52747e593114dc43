"""Host memory for gradients of streamed weights, kept from step to step.

Each unit has one arena with a *run* of memory for each of its weights that train, and gets a second
one where gradients are accumulated over several backward passes. What ``param.grad`` shows is such
a run. A run is used again only when nobody refers to it: neither a parameter, nor a caller who kept
a gradient of an earlier step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, empty_strided

from dist_layerlr.offload.device import Backend
from dist_layerlr.offload.internals import storage_key, uses_of
from dist_layerlr.offload.masters import Master, Unit, aligned, part_of

STAGING = 2
"""Groups of gradients that are on their way at a time; a bound on what waits on the device."""
GROUP_BYTES = 64 * 2**20
"""Gradients of one unit are sent together up to this size: larger copies are not faster, and all of
a group waits on the device until its last one is there."""
_ARENAS = 2
"""For what was there, and for what arrives."""


def group_capacity(units: Iterable[Sequence[int]]) -> int:
    """Most bytes that are sent together, aligned one by one.

    Args:
        units: bytes of the gradients of each unit.
    """
    capacity = 0
    for sizes in units:
        parts = list(map(aligned, sizes))
        capacity = max(capacity, min(sum(parts), GROUP_BYTES), *parts, 0)
    return capacity


@dataclass(slots=True)
class _Run:
    """Kept memory for the gradient of one parameter."""

    view: Tensor
    key: int
    """Of its storage."""
    own: int = 0
    """Number of tensors on it while it is free; 0: not counted yet."""


class GradSum:
    """The gradient of one parameter: what was there before a backward pass, and what arrives."""

    def __init__(self, master: Master, arenas: UnitGradients):
        self.param, self.arenas = master.weight.param, arenas
        self._dtype, self._shape, self._stride = master.dtype, master.shape, master.stride
        self._runs: list[_Run] = []
        self.grouped = False
        """Whether a gradient waits for others of its unit."""
        self.touched = False
        """Whether ``param.grad`` was taken in this backward pass."""
        self.before: Tensor | None = None
        """What ``param.grad`` was when the pass began, plus what earlier graph tasks added."""
        self._arrived: Tensor | None = None
        """The sum of one graph task's gradients."""
        self._task = -1
        """Which graph task that is."""

    def add_run(self, memory: Tensor) -> None:
        """Get one more run, in an arena of the unit."""
        view = memory.view(self._dtype).as_strided(self._shape, self._stride)
        self._runs.append(_Run(view, storage_key(view)))

    def free_run(self) -> Tensor | None:
        """A run that nobody refers to; None: there is none."""
        for run in self._runs:
            uses = uses_of(run.key)
            # Nobody else had it before the first look.
            run.own = run.own or uses
            if uses == run.own:
                # Another tensor on the memory: while it lives, the run is not free.
                return run.view.data
        return None

    def fits(self, gradient: Tensor) -> bool:
        """Whether a gradient is of the kind that runs are made for."""
        return gradient.dtype is self._dtype and gradient.shape == self._shape

    def add(self, gradient: Tensor, task: int) -> None:
        """Add a gradient of a graph task; it is ours from now on.

        Gradients of one backward pass are summed first, then added to the old ``param.grad``; those
        of a nested pass (reentrant checkpointing) are summed separately. This is torch's order;
        another one would not be bitwise equal.
        """
        if self._arrived is not None and task == self._task:
            self._arrived.add_(gradient)
            return
        self._fold()
        self._arrived, self._task = gradient, task

    def _fold(self) -> None:
        if self._arrived is not None:
            self.before = self._arrived if self.before is None else self.before.add_(self._arrived)
            self._arrived = None

    def take(self) -> Tensor | None:
        """The gradient at the end of a pass. Nothing of it is left here."""
        self._fold()
        total, self.before, self.touched = self.before, None, False
        return total


class UnitGradients:
    """The gradients of one unit."""

    def __init__(self, unit: Unit, backend: Backend, *, pinned: bool):
        self._backend, self._pinned, self.name = backend, pinned, unit.name
        trained = [m for m in unit.masters if m.trainable]
        self.sums = [GradSum(m, self) for m in trained]
        self._sizes = [m.nbytes for m in trained]
        self._arenas: list[Tensor] = []
        self.grow()

    def grow(self) -> bool:
        """Get one more arena; False: there are as many as may be."""
        if len(self._arenas) == _ARENAS:
            return False
        arena = self._backend.host_buffer(sum(map(aligned, self._sizes)), pinned=self._pinned)
        if self._pinned:
            self._backend.pin(arena)
        self._arenas.append(arena)
        start = 0
        for total, size in zip(self.sums, self._sizes, strict=True):
            total.add_run(part_of(arena, start, size))
            start += aligned(size)
        return True

    def target(self, total: GradSum, gradient: Tensor) -> Tensor | None:
        """Host memory for a gradient; None: wait for others first, which may free some."""
        if not total.fits(gradient):
            return empty_strided(
                gradient.shape, gradient.stride(), dtype=gradient.dtype, device="cpu"
            )
        return total.free_run()

    def close(self) -> None:
        """Unlock the arenas. A gradient that somebody holds keeps its memory."""
        arenas, self._arenas = self._arenas, []
        for arena in arenas if self._pinned else []:
            self._backend.unpin(arena)
