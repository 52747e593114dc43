"""Whether a backward pass gives streamed weights their gradients.

A weight that returns to the host gets another accumulating node when it is on the device again. So
``backward(inputs=...)``, which asks for the node that a weight has now, never reaches the node in
the graph, and leaves the weight without a gradient. On the CPU both are one node.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.internals import gradient_node, graph_task, runs_in_this_pass
from dist_layerlr.offload.masters import Unit

_Gradient = tuple[int, int]
"""(identity, writes) of a gradient: other numbers say that it was accumulated into."""


class Reach:
    """Watches which accumulating nodes a backward pass runs."""

    def __init__(self, units: Sequence[Unit], across_devices: bool):
        """Watch nothing yet.

        Args:
            units: of the model.
            across_devices: whether their weights change device, and with it their nodes.
        """
        self._across = across_devices
        self.asks = False
        """Whether ``leaf`` is to be called for the next weight. One of each visit is enough: the
        others' nodes run in a pass, or do not, as this one's does."""
        self._weights = [unit.trained_at() for unit in units]
        """Per unit {first byte in the slot: the parameter there, if it trains}."""
        # Weak: the engine must not keep a model alive that its user dropped.
        self._model: weakref.ref[nn.Module] | None = None
        self._reached = False
        """Whether the pass runs the node of any streamed weight that it read."""
        self._before: dict[nn.Parameter, _Gradient] | None = None
        """Gradients when the pass first read a weight whose node it does not run."""

    def watch(self, model: nn.Module) -> None:
        """The model that the units belong to."""
        self._model = weakref.ref(model)

    def visit(self, unit: int) -> None:
        """A unit was pointed at the device."""
        # In recomputation a parameter came back from the host: it has another node there, which
        # lies in no graph that backward runs through.
        self.asks = self._across and bool(self._weights[unit]) and graph_task() == -1

    def begin(self) -> None:
        """A backward pass begins."""
        self._reached, self._before = False, None

    def leaf(self, unit: int, tensor: Tensor) -> Any:
        """The accumulating node of a tensor in a unit's slot that autograd saves, if it has one."""
        start = int(tensor.storage_offset()) * tensor.dtype.itemsize
        param = self._weights[unit].get(start)
        if param is None or not param.requires_grad:
            return None
        self.asks = False
        return gradient_node(param)

    def read(self, leaf: Any) -> None:
        """Backward asks for a tensor that was saved with this node."""
        if self._reached:
            return
        if runs_in_this_pass(leaf):
            self._reached = True
        elif self._before is None:
            self._before = self._gradients()

    def check(self) -> None:
        """A pass has ended without an error: refuse it if it left out streamed weights.

        A pass that gave no other weight a gradient was not meant to: ``autograd.grad`` of an input.

        Raises:
            OffloadError: others got a gradient.
        """
        before, self._before = self._before, None
        if before is None or self._reached or self._gradients() == before:
            return
        raise OffloadError(
            "backward(inputs=...) gives streamed weights no gradient on a device. Call backward()"
            " without inputs, freeze what is not to train, or set stream_trainable=False."
        )

    def _gradients(self) -> dict[nn.Parameter, _Gradient]:
        model = None if self._model is None else self._model()
        found: dict[nn.Parameter, _Gradient] = {}
        if model is None:
            return found
        for param in model.parameters():
            if param.grad is not None:
                found[param] = id(param.grad), param.grad._version
        return found
