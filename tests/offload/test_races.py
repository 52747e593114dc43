"""The backend of real devices, over watched queues: nothing runs before what it needs, copies run
beside compute, and each way to order too little, or too much, is found."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_layerlr.offload import budget, gradients
from dist_layerlr.offload.copies import DeviceCopies
from dist_layerlr.offload.device import Accelerator
from dist_layerlr.offload.masters import payload_bytes
from dist_layerlr.offload.streaming import Handle, stream_on
from dist_layerlr.offload.transfer import Fetcher
from dist_layerlr.offload.units import find_units
from tests.offload.test_equality import FAMILIES, MATRIX
from tests.support.families import toy_batch
from tests.support.toys import WIDTH
from tests.support.training import (
    Case,
    assert_equal,
    loss_of,
    make_optimizer,
    moments,
    resident,
    train,
    weights,
)

pytestmark = pytest.mark.parametrize("device", ["sim"])
LORA, FULL = Case(lora=True), Case(lora=False)
COVERING = [*MATRIX[::14], FAMILIES[3], FAMILIES[-4]]
"""In a run that is not of the full matrix."""


def _stream(model: Any, case: Case, *, watch: bool = True, **policy: Any) -> tuple[Handle, Any]:
    from tests.support.races import Detector, watch_overlap

    backend = Detector()
    handle = stream_on(backend, model, case.policy(**policy))
    if watch:
        watch_overlap(handle)
    return handle, backend.races


def _cases() -> list[Any]:
    return [
        pytest.param(case, id=str(case), marks=() if case in COVERING else pytest.mark.full)
        for case in [*MATRIX, *FAMILIES]
    ]


@pytest.mark.parametrize("case", _cases())
def test_streamed_training_has_no_race_overlaps_and_equals_resident_training(
    case: Case, device: str
):
    wanted, wanted_moments, losses = resident(case, device)
    model = case.model()
    optimizer = make_optimizer(model)
    handle, races = _stream(model, case)
    assert train(model, optimizer, case, device) == losses
    fetches = handle.stats().total.fetches
    handle.remove()
    races.check()
    assert races.locked == {}
    # All but the first of a forward, and of a backward that recomputes, came beside compute.
    assert races.overlapped >= fetches // 2
    assert_equal(weights(model), wanted)
    assert_equal(moments(model, optimizer), wanted_moments)


@pytest.mark.parametrize("kind", ["one staging buffer", "two staging buffers", "int8"])
def test_staging_and_8_bits_have_no_race(kind: str, device: str, monkeypatch: pytest.MonkeyPatch):
    case, policy = FULL, {"pinned_pool_mb": 1}
    if kind == "int8":
        case, policy = LORA, {"host_dtype": "int8"}
    specs = find_units(case.model(), case.policy())
    size = payload_bytes(specs[0], None) * (2 if kind.startswith("two") else 1)
    monkeypatch.setattr(budget, "MEBIBYTE", size + budget.grad_staging_bytes(specs))
    model = case.model()
    handle, races = _stream(model, case, **policy)
    train(model, make_optimizer(model), case, device)
    handle.remove()
    races.check()
    threads = {"offload-staging_0", "offload-gradients_0"} if case is FULL else set()
    assert set(races.entered) == threads


# What people do


def _train(model: Any, races: Any, case: Case = FULL) -> None:
    train(model, make_optimizer(model), case, "sim")


def _swap_averages(model: Any, races: Any) -> None:
    """Averaged weights in, a validation whose loss is read later, and out again."""
    for _ in range(2):
        for p in model.parameters():
            if p.device.type == "cpu":
                p.data.mul_(0.5)
        with torch.no_grad():
            model.blocks[1](torch.ones(2, WIDTH).to("sim"))
            model(toy_batch(0)["x"].to("sim"))


def _step_behind_a_forward(model: Any, races: Any) -> None:
    optimizer = make_optimizer(model)
    loss_of(model, FULL, 0, "sim").backward()
    model.blocks[2](torch.ones(2, WIDTH).to("sim"))
    optimizer.step()


def _write_behind_a_partial_backward(model: Any, races: Any) -> None:
    x = torch.ones(2, WIDTH).to("sim").requires_grad_()
    for block in model.blocks:
        x = block(x if block is not model.blocks[3] else x.detach().requires_grad_())
    x.sum().backward()
    model.blocks[2].mlp[0].weight.data.zero_()


def _use_a_view_late(model: Any, races: Any) -> None:
    """A view of a frozen weight is used behind two other blocks, and then dropped."""
    kept: list[torch.Tensor] = []

    def use(*_: Any) -> None:
        kept.pop().mul(2)

    model.blocks[0].mlp[2].register_forward_hook(lambda m, *_: kept.append(m.weight.detach()))
    model.blocks[2].register_forward_hook(use)
    with torch.no_grad():
        model(toy_batch(0)["x"].to("sim"))


def _preview_on_a_side_queue(model: Any, races: Any) -> None:
    """It waits for nothing, and nothing waits for it."""
    side, x = races.new(), torch.ones(2, WIDTH).to("sim")
    races.synchronise()
    # With gradients on, the host does not wait behind a block that is called alone.
    model.blocks[1](x)
    with races.use(side):
        model.blocks[1](x)
        model.blocks[2](x)
    for i in (3, 4, 5, 0, 2):
        model.blocks[i](x)
    races.synchronise()


SCRIPTS: list[tuple[Callable[[Any, Any], None], Case]] = [
    (_swap_averages, FULL),
    (_swap_averages, LORA),
    (_step_behind_a_forward, FULL),
    (_write_behind_a_partial_backward, FULL),
    (_use_a_view_late, LORA),
    (_preview_on_a_side_queue, LORA),
]


@pytest.mark.parametrize("script, case", SCRIPTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_people_do_around_a_step_has_no_race(
    script: Callable[[Any, Any], None], case: Case, device: str
):
    model = case.model()
    handle, races = _stream(model, case, watch=False)
    script(model, races)
    races.check()
    handle.remove()
    races.check()


@pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
def test_a_model_that_is_dropped_is_unlocked_behind_its_copies(case: Case, device: str):
    model: Any = case.model()
    handle, races = _stream(model, case, watch=False)
    engine: Any = handle._engine
    engine.need(1)
    engine.point_at_host()  # block 2 is on its way
    assert races.locked
    del model, handle, engine
    gc.collect()
    races.check()
    assert races.locked == {}


# The first batch's own copy takes as long as the first block's, which it hides.
@pytest.mark.parametrize("copy_ms, late", [(1e-6, 0), (1e6, 20)])
def test_stalls_are_copies_that_compute_waited_for(copy_ms: float, late: int, device: str):
    from tests.support.races import Detector

    model, backend = LORA.model(), Detector(kernel_ms=1.0, copy_ms=copy_ms)
    with stream_on(backend, model, LORA.policy()) as handle:
        _train(model, backend.races, LORA)
        backend.synchronize()
        total = handle.stats().total
    assert total.fetches == 21
    assert total.stalls == late
    assert total.stall_s == pytest.approx(late * copy_ms / 1e3, rel=0.001)


# Mutants: each orders too little, or too much


def no_wait_for_a_free_slot() -> None:
    upload = Accelerator.upload
    Accelerator.upload = lambda self, target, source, after, then: upload(  # type: ignore[method-assign]
        self, target, source, self._queues.record(self._copies), then
    )


def no_wait_for_a_copy() -> None:
    Accelerator.wait = lambda self, ready: None  # type: ignore[method-assign]


def no_wait_for_a_gradient() -> None:
    def download(self: Any, targets: Any, sources: Any) -> Any:
        with self._queues.use(self._gradients):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
        return self._queues.record(self._gradients)

    Accelerator.download = download  # type: ignore[method-assign]


def ready_before_the_expansion() -> None:
    def upload(self: Any, target: Any, source: Any, after: Any, then: Any) -> Any:
        self._copies.wait_event(after)
        with self._queues.use(self._copies):
            target.copy_(source, non_blocking=True)
            ready = self._queues.record(self._copies)
            if then is not None:
                then()
        return ready

    Accelerator.upload = upload  # type: ignore[method-assign]


def a_queue_for_each_copy() -> None:
    upload = Accelerator.upload

    def anew(self: Any, *args: Any) -> Any:
        self._copies = self._queues.new()
        return upload(self, *args)

    Accelerator.upload = anew  # type: ignore[method-assign]


def the_host_never_waits() -> None:
    Accelerator.finish = lambda self, event: None  # type: ignore[method-assign]


def each_copy_is_waited_for_at_once() -> None:
    start = DeviceCopies._start

    def serial(self: Any, load: Any) -> None:
        start(self, load)
        self._backend.wait(self.fetcher.queued(self._ready[load.unit]))

    DeviceCopies._start = serial  # type: ignore[method-assign]


def a_slot_is_free_though_a_view_shows_it() -> None:
    def release(self: Any, unit: int) -> None:
        self.slot_of(unit).free = self._backend.mark()

    DeviceCopies.release = release  # type: ignore[method-assign]


def a_gradient_is_not_kept() -> None:
    sent = gradients._Sent
    gradients._Sent = lambda **known: sent(**{**known, "kept": []})  # type: ignore[misc, assignment]


def masters_are_given_back_at_once() -> None:
    Fetcher.release_masters = lambda self: None  # type: ignore[method-assign]


def memory_is_unlocked_without_a_wait() -> None:
    Accelerator.synchronize = lambda self: None  # type: ignore[method-assign]
    masters_are_given_back_at_once()


def slots_are_marked_before_the_payload_is_allocated() -> None:
    fetch = Fetcher.fetch

    def late(self: Any, unit: Any, slot: Any) -> Any:
        if self._payload is not None and not hasattr(self, "late"):
            self.late, self._payload = True, self._backend.allocate(self._payload.numel())
        return fetch(self, unit, slot)

    Fetcher.fetch = late  # type: ignore[method-assign]


def only_the_last_use_of_a_slot_counts() -> None:
    mark = Accelerator.mark
    Accelerator.mark = lambda self, behind=None: mark(self)  # type: ignore[method-assign]


def a_copy_is_waited_for_once() -> None:
    rest = DeviceCopies._wait_for

    def once(self: Any, unit: int) -> None:
        rest(self, unit)
        self._ready.pop(unit, None)

    DeviceCopies._wait_for = once  # type: ignore[method-assign]


def staging_is_reused_in_flight() -> None:
    finish = Accelerator.finish

    def unless_staged(self: Any, event: Any) -> None:
        import threading

        if not threading.current_thread().name.startswith("offload-staging"):
            finish(self, event)

    Accelerator.finish = unless_staged  # type: ignore[method-assign]
    specs = find_units(FULL.model(), FULL.policy())
    budget.MEBIBYTE = payload_bytes(specs[0], None) + budget.grad_staging_bytes(specs)


def a_thread_leaves_the_device_at_once() -> None:
    def enter_thread(self: Any) -> None:
        self._queues.use(self._copies).__enter__()

    Accelerator.enter_thread = enter_thread  # type: ignore[method-assign]
    specs = find_units(FULL.model(), FULL.policy())
    budget.MEBIBYTE = payload_bytes(specs[0], None) + budget.grad_staging_bytes(specs)


INT8, POOL = {"host_dtype": "int8"}, {"pinned_pool_mb": 1}
Script = Callable[[Any, Any], None]
MUTANTS: list[tuple[Callable[[], None], str, Script, Case, dict[str, Any]]] = [
    (no_wait_for_a_free_slot, "RACE", _train, FULL, {}),
    (no_wait_for_a_copy, "RACE", _train, FULL, {}),
    (no_wait_for_a_gradient, "RACE", _train, FULL, {}),
    (ready_before_the_expansion, "RACE", _train, LORA, INT8),
    (a_queue_for_each_copy, "RACE", _train, LORA, INT8),
    (the_host_never_waits, "HOSTWRITE", _step_behind_a_forward, FULL, {}),
    (each_copy_is_waited_for_at_once, "SERIAL", _train, FULL, {}),
    (a_slot_is_free_though_a_view_shows_it, "RACE", _use_a_view_late, LORA, {}),
    (a_gradient_is_not_kept, "FREED", _train, FULL, {}),
    (masters_are_given_back_at_once, "HOSTWRITE", _swap_averages, FULL, {}),
    (masters_are_given_back_at_once, "HOSTWRITE", _step_behind_a_forward, FULL, {}),
    (masters_are_given_back_at_once, "HOSTWRITE", _write_behind_a_partial_backward, FULL, {}),
    (slots_are_marked_before_the_payload_is_allocated, "RACE", _train, LORA, INT8),
    (only_the_last_use_of_a_slot_counts, "RACE", _preview_on_a_side_queue, LORA, {}),
    (a_copy_is_waited_for_once, "RACE", _preview_on_a_side_queue, LORA, {}),
    (staging_is_reused_in_flight, "HOSTWRITE", _train, FULL, POOL),
    (a_thread_leaves_the_device_at_once, "DEVICE", _train, FULL, POOL),
]


@pytest.mark.parametrize(
    "mutant, sign, script, case, policy",
    MUTANTS,
    ids=[f"{m.__name__}-{s.__name__.strip('_')}" for m, _, s, _, _ in MUTANTS],
)
def test_a_mutant_is_found(
    mutant: Callable[[], None],
    sign: str,
    script: Script,
    case: Case,
    policy: dict[str, Any],
    device: str,
):
    mutant()
    model = case.model()
    handle, races = _stream(model, case, **policy)
    script(model, races)
    with contextlib.suppress(AssertionError):
        races.check()
    assert any(found.startswith(sign) for found in races.found), races.found[:5]
    handle.remove()


def test_memory_that_is_unlocked_under_a_copy_is_found(device: str):
    memory_is_unlocked_without_a_wait()
    model: Any = LORA.model()
    handle, races = _stream(model, LORA, watch=False)
    model.blocks[1](torch.ones(2, WIDTH).to(device))
    handle.remove()
    assert any(found.startswith("UNREGISTERED") for found in races.found)
