"""Gradients of streamed weights: to the host as they arrive, summed there in the order torch would
have used.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend, Event, host_buffer
from dist_layerlr.offload.internals import accumulate_hooks, graph_task

STAGING = 2
"""Staging buffers, each as large as the largest gradient; a bound on gradients that wait on the
device."""


class _Sum:
    """The gradient of one parameter during a backward pass."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        """What ``param.grad`` was."""
        self._arrived: Tensor | None = None
        self._task = -1

    def add(self, gradient: Tensor, task: int) -> None:
        """Gradients of one graph task are added up before they meet what was there.

        A nested task's come apart.
        """
        if self._arrived is not None and task == self._task:
            self._arrived.add_(gradient)
            return
        self.fold()
        self._arrived, self._task = gradient.clone(), task

    def fold(self) -> Tensor | None:
        """Add what arrived to what was there."""
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
        self._sums: dict[nn.Parameter, _Sum] = {}
        self._pending: list[Future[None]] = []
        self.nbytes = 0
        """Sent to the host so far."""
        params = list(params)
        largest = max((p.numel() * p.element_size() for p in params), default=0)
        self._staging = [host_buffer(largest) for _ in range(STAGING if params else 0)]
        self._idle: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for buffer in self._staging:
            backend.pin(buffer)
            self._idle.put(buffer)
        # A tensor hook runs before the gradient is accumulated and, as the other one, survives a
        # change of device; hooks on the AccumulateGrad node do not.
        self._hooks: list[RemovableHandle] = []
        for param in params:
            hooked: Any = param
            self._hooks.append(hooked.register_hook(lambda _, p=param: self._set_aside(p)))
            self._hooks.append(hooked.register_post_accumulate_grad_hook(self._take))
        self._worker = ThreadPoolExecutor(1, "offload-gradients") if params else None

    def settle(self) -> None:
        """Wait for all gradients and put the sums back. Parameters must point at the host."""
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
        for buffer in self._staging:
            self._backend.unpin(buffer)
        self._staging = []

    def _set_aside(self, param: nn.Parameter) -> None:
        """A gradient from before lies on the host.

        One that arrives on the device cannot be added to it there.
        """
        self._begin()
        if param not in self._sums:
            self._sums[param] = _Sum()
            self._sums[param].before, param.grad = param.grad, None

    def _take(self, param: nn.Parameter) -> None:
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
        buffer = self._idle.get()
        try:
            view = (
                buffer[: gradient.nbytes]
                .view(gradient.dtype)
                .as_strided(gradient.shape, gradient.stride())
            )
            done = self._backend.download(view, gradient)  # point 4 of [Note: stream order]
            self.nbytes += gradient.nbytes
            assert self._worker is not None
            work = self._worker.submit(
                self._add, self._sums[param], buffer, view, gradient, done, graph_task()
            )
        except BaseException:
            self._idle.put(buffer)
            raise
        self._pending.append(work)

    def _add(
        self, total: _Sum, buffer: Tensor, view: Tensor, gradient: Tensor, done: Event, task: int
    ) -> None:
        """On the worker's thread.

        ``gradient`` is an argument so that its memory lives until the copy is done.
        """
        try:
            self._backend.finish(done)
            total.add(view, task)
        finally:
            self._idle.put(buffer)
