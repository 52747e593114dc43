"""Gradients of streamed weights: copied to the host as they arrive, and summed there.

The order of the sums is torch's, so that they are bitwise those of a resident model.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend, Event
from dist_layerlr.offload.internals import accumulate_hooks, graph_task

STAGING = 2
"""Staging buffers, each as large as the largest gradient; a bound on gradients that wait on the
device."""


class _GradSum:
    """The gradient of one parameter during a backward pass, on the host."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        """What ``param.grad`` was when the pass began, plus what earlier graph tasks added."""
        self._arrived: Tensor | None = None
        """The sum of one graph task's gradients."""
        self._task = -1
        """Which graph task that is."""

    def add(self, gradient: Tensor, task: int) -> None:
        """Add a gradient of a graph task.

        Gradients of one backward pass are summed first, then added to the old ``param.grad``; those
        of a nested pass (reentrant checkpointing) are summed separately. This is torch's order;
        another one would not be bitwise equal.
        """
        if self._arrived is not None and task == self._task:
            self._arrived.add_(gradient)
            return
        self.fold()
        # A copy: the gradient lies in a staging buffer, which goes back to the others.
        self._arrived, self._task = gradient.clone(), task

    def fold(self) -> Tensor | None:
        """Add what arrived to what was there, and return the sum."""
        if self._arrived is not None:
            self.before = self._arrived if self.before is None else self.before.add_(self._arrived)
            self._arrived = None
        return self.before


class GradSink:
    """Takes ``param.grad`` away during backward, and puts the sum back at its end."""

    def __init__(self, backend: Backend, params: Iterable[nn.Parameter], begin: Callable[[], None]):
        """Hook the parameters.

        Args:
            backend: of the device that computes.
            params: streamed trainable ones.
            begin: called before the first gradient of a backward pass.
        """
        self._backend, self._begin = backend, begin
        self._sums: dict[nn.Parameter, _GradSum] = {}
        """Of the parameters whose gradient arrived in this backward pass."""
        self._pending: list[Future[None]] = []
        """Copies to the host that may still run."""
        self.nbytes = 0
        """Sent to the host so far."""
        params = list(params)
        largest = max((p.numel() * p.element_size() for p in params), default=0)
        self._staging: list[Tensor] = []
        self._idle: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(STAGING if params else 0):
            buffer = backend.host_buffer(largest, pinned=True)
            backend.pin(buffer)
            self._staging.append(buffer)
            self._idle.put(buffer)
        # A tensor hook runs before the gradient is accumulated and, as the other one, survives a
        # change of device; hooks on the AccumulateGrad node do not. Both refer weakly to us and to
        # the parameter: torch holds them where Python's collector does not look.
        self._hooks: list[RemovableHandle] = []
        sink = weakref.ref(self)
        for param in params:
            hooked: Any = param
            before = partial(_before_accumulation, sink, weakref.ref(param))
            behind = partial(_behind_accumulation, sink)
            self._hooks.append(hooked.register_hook(before))
            self._hooks.append(hooked.register_post_accumulate_grad_hook(behind))
        self._worker: ThreadPoolExecutor | None = None
        if params:
            self._worker = ThreadPoolExecutor(
                1, "offload-gradients", initializer=backend.enter_thread
            )

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients were taken from parameters and not put back yet."""
        return bool(self._sums)

    def assign_gradients(self) -> None:
        """Wait for all gradients and set ``param.grad`` to the sums.

        Parameters must point at the host: torch refuses a gradient on another device.
        """
        sums, self._sums = self._sums, {}
        pending, self._pending = self._pending, []
        for copy in pending:
            copy.result()
        for param, total in sums.items():
            param.grad = total.fold()

    def close(self) -> None:
        """Remove the hooks and free the buffers."""
        for hook in self._hooks:
            hook.remove()
        if self._worker is not None:
            self._worker.shutdown()
        # The worker has waited for every copy into them.
        for buffer in self._staging:
            self._backend.unpin(buffer)
        self._staging = []

    def _set_aside(self, param: nn.Parameter) -> None:
        """Take the gradient of earlier passes away, before autograd adds to it.

        It lies on the host, and the new one on the device: autograd could not add them.
        """
        self._begin()
        if param not in self._sums:
            self._sums[param] = _GradSum()
            self._sums[param].before, param.grad = param.grad, None

    def _send_to_host(self, param: nn.Parameter) -> None:
        """Take the gradient that autograd just accumulated and start its copy to the host."""
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
        # This blocks autograd while all buffers are in use, which bounds the gradients that wait on
        # the device.
        buffer = self._idle.get()
        try:
            # The strides are the gradient's, so that the copy is one run of memory.
            view = (
                buffer[: gradient.nbytes]
                .view(gradient.dtype)
                .as_strided(gradient.shape, gradient.stride())
            )
            done = self._backend.download(view, gradient)  # point 4 of [Note: stream order]
            self.nbytes += gradient.nbytes
            assert self._worker is not None
            work = self._worker.submit(
                self._add_on_host, self._sums[param], buffer, view, gradient, done, graph_task()
            )
        except BaseException:
            # No work was submitted that would give the buffer back.
            self._idle.put(buffer)
            raise
        self._pending.append(work)

    def _add_on_host(
        self, total: _GradSum, buffer: Tensor, view: Tensor, kept: Tensor, done: Event, task: int
    ) -> None:
        """Wait for a copy and add it to its sum. Runs on the worker's thread.

        ``kept`` is the gradient on the device: it is an argument so that its memory lives until the
        copy is done. Point 4 of [Note: stream order].
        """
        try:
            self._backend.finish(done)
            total.add(view, task)
        finally:
            self._idle.put(buffer)


def _before_accumulation(
    sink: weakref.ref[GradSink], param: weakref.ref[nn.Parameter], gradient: Tensor
) -> None:
    live, weight = sink(), param()
    if live is not None and weight is not None:
        live._set_aside(weight)


def _behind_accumulation(sink: weakref.ref[GradSink], param: nn.Parameter) -> None:
    live = sink()
    if live is not None:
        live._send_to_host(param)
