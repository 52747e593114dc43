"""Every known way to get streaming wrong fails some test. Each mutant runs in a process of its own,
on `sim`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from dist_layerlr.offload import engine as engine_module
from dist_layerlr.offload import saved as saved_module
from dist_layerlr.offload.copies import DeviceCopies
from dist_layerlr.offload.engine import Engine
from dist_layerlr.offload.grad_memory import GradSum
from dist_layerlr.offload.gradients import GradSink
from dist_layerlr.offload.saved import SavedTensors
from dist_layerlr.offload.triggers import OwnerHooks, Triggers
from tests.offload.test_equality import check
from tests.offload.test_gradients import gradients_that_are_kept, three_uses_in_one_pass
from tests.offload.test_inside_units import another_unit_inside, module_alone
from tests.offload.test_limits import check_memory_of_a_graph
from tests.offload.test_semantics import LORA, two_forwards
from tests.support.adversary import Adversary
from tests.support.forked import in_fork
from tests.support.training import Case

Mutant = Callable[[], None]


def no_ready_wait() -> None:
    Adversary.wait = lambda self, ready: None  # type: ignore[method-assign]


def no_free_wait() -> None:
    """The copy stream goes by the slot's first event for ever."""
    rest = Engine.point_at_host

    def stale(self: Any) -> None:
        free = [slot.free for slot in self.copies._slots]
        rest(self)
        for slot, before in zip(self.copies._slots, free, strict=True):
            slot.free = before

    Engine.point_at_host = stale  # type: ignore[method-assign]


def free_event_behind_the_forward_only() -> None:
    """As if backward did not read the slot again."""
    rest = Engine.point_at_host

    def early(self: Any) -> None:
        free = [slot.free for slot in self.copies._slots]
        rest(self)
        if engine_module.graph_task() != -1:
            for slot, before in zip(self.copies._slots, free, strict=True):
                slot.free = before

    Engine.point_at_host = early  # type: ignore[method-assign]


def _evict(self: Any, index: int) -> None:
    self.point_at_host()
    if index in self.copies.ring.holders():
        self.copies.ring.drop(index)


def evict_behind_the_forward() -> None:
    leave = Triggers._leave_unit

    def evicting(self: Any, module: nn.Module, *args: Any) -> None:
        leave(self, module, *args)
        units = self._engine.units
        _evict(self._engine, next(i for i, unit in enumerate(units) if unit.module is module))

    Triggers._leave_unit = evicting  # type: ignore[method-assign]


def evict_behind_the_backward_hook() -> None:
    register = Triggers.register

    def hooked(self: Any, *args: Any) -> Any:
        yield from register(self, *args)
        for index, unit in enumerate(self._engine.units):
            yield unit.module.register_full_backward_hook(
                lambda m, g, o, index=index: _evict(self._engine, index)
            )

    Triggers.register = hooked  # type: ignore[method-assign]


def no_saved_tensor_hooks() -> None:
    SavedTensors.record = lambda self: None  # type: ignore[method-assign]


def no_saved_tensor_hooks_and_no_look_at_who_refers_to_a_slot() -> None:
    no_saved_tensor_hooks()
    DeviceCopies.in_use_elsewhere = lambda self: set()  # type: ignore[method-assign]


def saved_tensor_hooks_that_cover_a_checkpoint() -> None:
    saved_module.outer_saved_hooks = lambda: None  # type: ignore[attr-defined]


def no_gradient_set_aside() -> None:
    def keep(self: Any, total: Any) -> None:
        self._begin()
        if not total.touched:
            total.touched = True
            self._touched.append(total)

    GradSink.set_aside = keep  # type: ignore[method-assign]


def no_end_of_backward() -> None:
    engine_module.at_end_of_backward = lambda call: KEPT.append(call)  # type: ignore[attr-defined]


def gradients_are_given_back_before_they_are_there() -> None:
    finish = Adversary.finish

    def never_for_gradients(self: Any, event: Any) -> None:
        if event in self._queue:
            finish(self, event)

    Adversary.finish = never_for_gradients  # type: ignore[method-assign]


def gradients_are_summed_as_they_land() -> None:
    """As if those of one pass were not to be summed before the old ones are added."""

    def add(self: Any, gradient: Any, task: int) -> None:
        self.before = gradient if self.before is None else self.before.add_(gradient)

    GradSum.add = add  # type: ignore[method-assign]


def memory_of_gradients_is_used_though_somebody_holds_it() -> None:
    GradSum.free_run = lambda self: self._runs[0].view.data  # type: ignore[method-assign]


def hooks_inside_a_unit_rest_though_another_takes_its_place() -> None:
    Triggers._wake_running = lambda self: None  # type: ignore[method-assign]


def hooks_inside_a_unit_rest_for_ever() -> None:
    OwnerHooks.wake = lambda self: None  # type: ignore[method-assign]


KEPT: list[Any] = []


def rebind_instead_of_data() -> None:
    need = Engine.need

    def rebinding(self: Any, index: int) -> None:
        need(self, index)
        for master in self.units[index].masters:
            weight = master.weight
            weight.owner._parameters[weight.leaf] = nn.Parameter(
                weight.param.data, weight.param.requires_grad
            )

    Engine.need = rebinding  # type: ignore[method-assign]


def copies_frozen_weights_back() -> None:
    rest = Engine.point_at_host

    def writing(self: Any) -> None:
        backend = self.copies._backend
        if self._current is not None:
            for master in self.units[self._current].masters:
                done = backend.download([master.host], [master.weight.param.data])
                backend.finish(done)
        rest(self)

    Engine.point_at_host = writing  # type: ignore[method-assign]


def stale_copies_are_used() -> None:
    """The copy that a forward without backward left is taken for the stepped weight."""
    DeviceCopies.drop_outdated = lambda self, *_: None  # type: ignore[method-assign]
    DeviceCopies.drop_trained = lambda self: None  # type: ignore[method-assign]
    DeviceCopies.wake = lambda self: None  # type: ignore[method-assign]


FULL = Case(lora=False, accumulation=2, window=1)
PLAIN = Case(lora=True, window=1)
KILLED_BY: list[tuple[Mutant, str, Callable[[], None]]] = [
    (no_ready_wait, "equality", lambda: check(PLAIN, "sim")),
    (no_free_wait, "order of queues", lambda: check(PLAIN, "sim")),
    (free_event_behind_the_forward_only, "order of queues", lambda: check(PLAIN, "sim")),
    (
        evict_behind_the_forward,
        "fetch count",
        lambda: check(Case(lora=True, reentrant=False), "sim"),
    ),
    (evict_behind_the_backward_hook, "fetch count", lambda: check(PLAIN, "sim")),
    (no_saved_tensor_hooks, "no slot", lambda: two_forwards(LORA, "sim")),
    (
        no_saved_tensor_hooks_and_no_look_at_who_refers_to_a_slot,
        "equality",
        lambda: two_forwards(LORA, "cpu"),
    ),
    (
        saved_tensor_hooks_that_cover_a_checkpoint,
        "memory of a graph",
        lambda: check_memory_of_a_graph("sim", False),
    ),
    (no_gradient_set_aside, "device of a gradient", lambda: check(FULL, "sim")),
    (no_end_of_backward, "gradients at rest", lambda: check(FULL, "sim")),
    (
        hooks_inside_a_unit_rest_though_another_takes_its_place,
        "device of a weight",
        lambda: another_unit_inside(LORA, "sim"),
    ),
    (hooks_inside_a_unit_rest_for_ever, "device of a weight", lambda: module_alone("sim")),
    (gradients_are_given_back_before_they_are_there, "equality", lambda: check(FULL, "sim")),
    (gradients_are_summed_as_they_land, "equality", lambda: three_uses_in_one_pass("sim")),
    (
        memory_of_gradients_is_used_though_somebody_holds_it,
        "equality",
        lambda: gradients_that_are_kept("cpu"),
    ),
    (rebind_instead_of_data, "identity", lambda: check(FULL, "sim")),
    (copies_frozen_weights_back, "bytes to the host", lambda: check(PLAIN, "sim")),
    (stale_copies_are_used, "equality", lambda: check(FULL, "sim")),
]
SIGNS = {
    "equality": ("differ", "assert losses ==", "nan"),
    "order of queues": ("slot overwritten behind point",),
    "fetch count": ("by formula",),
    "no slot": ("No slot for",),
    "memory of a graph": ("streamed == alive",),
    "device of a gradient": ("same device", "the process died", "device"),
    "device of a weight": ("same device",),
    "gradients at rest": ("differ", "device", "losses"),
    "identity": ("before", "was replaced", "No slot for"),
    "bytes to the host": ("downloaded",),
}


@pytest.mark.parametrize("mutant, sign, test", KILLED_BY, ids=[m.__name__ for m, _, _ in KILLED_BY])
def test_a_mutant_is_found_by_the_check_that_is_meant_for_it(
    mutant: Mutant, sign: str, test: Callable[[], None]
):
    def run() -> None:
        mutant()
        with contextlib.redirect_stderr(None):
            test()

    kind, text = in_fork(run, "sim")
    assert kind == "failed", f"{mutant.__name__} survived"
    assert any(word in text for word in SIGNS[sign]), text
