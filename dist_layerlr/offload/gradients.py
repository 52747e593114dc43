"""Gradients of streamed weights: copied to the host unit by unit as they arrive, and summed there.

The order of the sums is torch's, so that they are bitwise those of a resident model.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, empty_like, nn
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend, Event
from dist_layerlr.offload.grad_memory import STAGING, GradSum, UnitGradients, group_capacity
from dist_layerlr.offload.internals import accumulate_hooks, graph_task
from dist_layerlr.offload.masters import Unit, aligned
from dist_layerlr.offload.meter import DOWNLOAD, Meter


@dataclass(slots=True, kw_only=True)
class _Sent:
    """Gradients of one unit on their way to the host."""

    done: Event
    """Behind their copies."""
    sums: list[GradSum]
    targets: list[Tensor]
    """Where they land."""
    kept: list[Tensor]
    """The gradients on the device, whose memory must live until the copies are done. Point 4 of
    [Note: stream order]."""
    task: int
    """The graph task that they are of."""


class GradSink:
    """Takes ``param.grad`` away during backward, and puts the sum back at its end."""

    def __init__(
        self,
        backend: Backend,
        units: Iterable[Unit],
        begin: Callable[[], None],
        meter: Meter,
        *,
        staged: bool,
    ):
        """Hook the parameters that train, and allocate host memory for their gradients.

        Args:
            backend: of the device that computes.
            units: of the model.
            begin: called before the first gradient of a backward pass.
            meter: is told of copies to the host.
            staged: whether that memory is pageable, behind pinned staging buffers.
        """
        self._backend, self._begin, self._meter = backend, begin, meter
        self.nbytes = 0
        """Sent to the host so far."""
        self._group: list[tuple[GradSum, Tensor]] = []
        """Gradients that wait for the others of their unit."""
        self._group_bytes, self._group_task = 0, -1
        self._in_flight: deque[_Sent] = deque()
        """Copies to the host that may still run, oldest first."""
        self._touched: list[GradSum] = []
        """Of the parameters whose gradient was taken in this backward pass."""
        self._units: list[UnitGradients] = []
        self._staging: deque[Tensor] = deque()
        self._worker: ThreadPoolExecutor | None = None
        trained = [unit for unit in units if unit.trained]
        sizes = [[m.nbytes for m in unit.masters if m.trainable] for unit in trained]
        self._capacity = group_capacity(sizes)
        self._hooks: list[RemovableHandle] = []
        try:
            for unit in trained:
                self._units.append(UnitGradients(unit, backend, pinned=not staged))
            if staged and trained:
                self._make_staging()
        except BaseException:
            # Memory that is locked already would stay locked.
            self.close()
            raise
        self._hook_parameters()

    def _make_staging(self) -> None:
        for _ in range(STAGING):
            buffer = self._backend.host_buffer(self._capacity, pinned=True)
            self._backend.pin(buffer)
            self._staging.append(buffer)
        # From a staging buffer to its place a gradient is copied beside autograd's thread.
        self._worker = ThreadPoolExecutor(
            1, "offload-gradients", initializer=self._backend.enter_thread
        )

    def _hook_parameters(self) -> None:
        # A tensor hook runs before the gradient is accumulated and, as the other one, survives a
        # change of device; hooks on the AccumulateGrad node do not. Both refer weakly to us: torch
        # holds them where Python's collector does not look.
        sink = weakref.ref(self)
        for unit in self._units:
            for total in unit.sums:
                hooked: Any = total.param
                of = weakref.ref(total)
                self._hooks.append(hooked.register_hook(partial(_before_accumulation, sink, of)))
                behind = partial(_behind_accumulation, sink, of)
                self._hooks.append(hooked.register_post_accumulate_grad_hook(behind))

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients were taken from parameters and not put back yet."""
        return bool(self._touched)

    def assign_gradients(self) -> None:
        """Wait for all gradients and set ``param.grad`` to the sums.

        Parameters must point at the host: torch refuses a gradient on another device.
        """
        self._send()
        self._land(0)
        touched, self._touched = self._touched, []
        for total in touched:
            total.param.grad = total.take()

    def close(self) -> None:
        """Remove the hooks and unlock the memory. No copy runs any more."""
        for hook in self._hooks:
            hook.remove()
        if self._worker is not None:
            self._worker.shutdown()
        while self._staging:
            self._backend.unpin(self._staging.pop())
        for unit in self._units:
            unit.close()

    def set_aside(self, total: GradSum) -> None:
        """Take the gradient of earlier passes away, before autograd adds to it.

        It lies on the host, and the new one on the device: autograd could not add them.
        """
        self._begin()
        if not total.touched:
            param = total.param
            total.touched, total.before, param.grad = True, param.grad, None
            self._touched.append(total)

    def collect(self, total: GradSum, param: nn.Parameter) -> None:
        """Take the gradient that autograd just accumulated; send it when its group is complete."""
        gradient, param.grad = param.grad, None
        if accumulate_hooks(param) > 1:
            raise OffloadError(
                f"A streamed parameter of shape {tuple(param.shape)} has a post-accumulate-grad"
                " hook, as optimizers that step during backward do: its gradient is on its way to"
                " the host. Step after backward, or set stream_trainable=False."
            )
        if gradient is None:  # frozen since the forward
            return
        if gradient.requires_grad or gradient.is_sparse:
            what = (
                "sparse" if gradient.is_sparse else "to be differentiated again (create_graph=True)"
            )
            raise OffloadError(
                f"A gradient of shape {tuple(param.shape)} is {what}. Set stream_trainable=False."
            )
        task, size = graph_task(), aligned(gradient.nbytes)
        if self._group and (
            total.grouped
            or self._group[0][0].arenas is not total.arenas
            or task != self._group_task
            or self._group_bytes + size > self._capacity
        ):
            self._send()
        self._group.append((total, gradient))
        self._group_bytes, self._group_task, total.grouped = self._group_bytes + size, task, True
        if len(self._group) == len(total.arenas.sums):
            self._send()

    def _send(self) -> None:
        """Start the copies of the gradients that wait, as one piece of work for the device."""
        group, self._group, self._group_bytes = self._group, [], 0
        if not group:
            return
        for total, _ in group:
            total.grouped = False
        # This blocks autograd while as many as may be are on their way, which bounds the gradients
        # that wait on the device.
        self._land(STAGING - 1)
        sums, gradients, targets, size = [], [], [], 0
        for total, gradient in group:
            sums.append(total)
            gradients.append(gradient)
            targets.append(self._target(total, gradient))
            size += gradient.nbytes
        done = self._stage(gradients, targets) if self._staging else None
        if done is None:
            done = self._backend.download(targets, gradients)  # point 4 of [Note: stream order]
        self.nbytes += size
        self._meter.add(DOWNLOAD, sums[0].arenas.name, self._backend.last_download, size)
        self._in_flight.append(
            _Sent(done=done, sums=sums, targets=targets, kept=gradients, task=self._group_task)
        )

    def _target(self, total: GradSum, gradient: Tensor) -> Tensor:
        """Host memory that nobody refers to."""
        arenas = total.arenas
        found = arenas.target(total, gradient)
        if found is None and self._in_flight:
            # An earlier one of this pass may be added to another, which frees its memory.
            self._land(0)
            found = arenas.target(total, gradient)
        if found is None and arenas.grow():
            found = arenas.target(total, gradient)
        # The caller keeps gradients of two steps, or the weight is used three times in a pass.
        return empty_like(gradient, device="cpu") if found is None else found

    def _stage(self, gradients: Sequence[Tensor], targets: list[Tensor]) -> Future[None]:
        """Copy by way of a staging buffer, from which the worker copies to the targets."""
        assert self._worker is not None
        # Landing gave back those of all groups but one.
        buffer = self._staging.popleft()
        self._staging.append(buffer)
        views, start = [], 0
        for gradient in gradients:
            part = buffer[start : start + gradient.nbytes].view(gradient.dtype)
            # The strides are the gradient's, so that the copy is one run of memory.
            views.append(part.as_strided(gradient.shape, gradient.stride()))
            start += aligned(gradient.nbytes)
        done = self._backend.download(views, gradients)  # point 4 of [Note: stream order]
        return self._worker.submit(self._unstage, done, views, targets)

    def _unstage(self, done: Event, views: list[Tensor], targets: list[Tensor]) -> None:
        """Runs on the worker's thread."""
        self._backend.finish(done)
        for view, target in zip(views, targets, strict=True):
            target.copy_(view)

    def _land(self, most: int) -> None:
        """Wait until at most so many groups are on their way, and add those that are there."""
        while len(self._in_flight) > most:
            sent = self._in_flight.popleft()
            if isinstance(sent.done, Future):
                sent.done.result()
            else:
                self._backend.finish(sent.done)
            for total, target in zip(sent.sums, sent.targets, strict=True):
                total.add(target, sent.task)


def _before_accumulation(
    sink: weakref.ref[GradSink], total: weakref.ref[GradSum], gradient: Tensor
) -> None:
    live, of = sink(), total()
    if live is not None and of is not None:
        live.set_aside(of)


def _behind_accumulation(
    sink: weakref.ref[GradSink], total: weakref.ref[GradSum], param: nn.Parameter
) -> None:
    live, of = sink(), total()
    if live is not None and of is not None:
        live.collect(of, param)
