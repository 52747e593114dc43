"""Streamed training equals resident training bit for bit, moves no byte too many, and leaves
nothing behind."""

from __future__ import annotations

import gc
from itertools import product
from typing import Any

import pytest
import torch

from dist_layerlr.offload.streaming import stream_on
from tests.support.forked import DEVICES
from tests.support.training import (
    Case,
    assert_equal,
    backend_of,
    exact,
    identity,
    make_optimizer,
    moments,
    resident,
    train,
    weights,
)

MATRIX = [
    Case(lora=lora, reentrant=reentrant, accumulation=accumulation, window=window, mode=mode)
    for lora, reentrant, accumulation, window, mode in product(
        (True, False), (None, True, False), (1, 2), (1, 2, 3), ("block", "layer")
    )
]
FAMILIES = [
    Case(family=family, lora=lora, reentrant=reentrant, accumulation=2, window=window)
    for family, lora, reentrant, window in product(
        ("wan", "ltx"), (True, False), (None, True, False), (1, 3)
    )
]


def _covering(cases: list[Case], every: int) -> list[Case]:
    """Of each ``every`` neighbours one, another one each time."""
    return [c for i, c in enumerate(cases) if i % every == (i // every) % every]


BLOCKS = [c for c in MATRIX if c.mode == "block"]
LAYERS = [c for c in MATRIX if c.mode == "layer"]
COVERING = {
    "cpu": _covering(BLOCKS, 3) + _covering(LAYERS, 6) + _covering(FAMILIES, 4),
    "sim": _covering(BLOCKS, 6) + LAYERS[1:2] + LAYERS[-2:-1] + FAMILIES[4:5] + FAMILIES[-6:-5],
}
COVERING["cuda"] = COVERING["cpu"]


def _params(cases: list[Case]) -> list[Any]:
    return [
        pytest.param(
            device,
            case,
            id=f"{device}-{case}",
            marks=() if case in COVERING[device] else pytest.mark.full,
        )
        for device in DEVICES
        for case in cases
    ]


def check(case: Case, device: str) -> None:
    """Everything that must hold for one case."""
    wanted_weights, wanted_moments, wanted_losses = resident(case, device)
    model = case.model()
    optimizer = make_optimizer(model)
    before = identity(model, optimizer)[:2]
    backend = backend_of(device)
    handle = stream_on(backend, model, case.policy(), optimizer=optimizer)

    def after_step() -> None:
        assert identity(model, optimizer)[:2] == before
        at_rest = [p for n, p in model.named_parameters() if n in set(handle.streamed_names())]
        assert at_rest and all(p.device.type == "cpu" and p.grad is None for p in at_rest)
        assert all(
            s.device == p.device for p in at_rest for s in optimizer.state.get(p, {}).values()
        )

    losses = train(model, optimizer, case, device, after_step=after_step)
    assert losses == (
        wanted_losses if exact(case, device) else pytest.approx(wanted_losses, abs=1e-5)
    )
    check_traffic(case, handle, backend)
    handle.remove()
    assert identity(model, optimizer)[:2] == before
    assert_equal(weights(model), wanted_weights, exact=exact(case, device))
    assert_equal(moments(model, optimizer), wanted_moments, exact=exact(case, device))
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    check_empty(device)


def check_traffic(case: Case, handle: Any, backend: Any) -> None:
    """Fetches, bytes each way and slots, from the formulas."""
    stats, units = handle.stats(), handle.units
    passes, count, slots = 3 * case.accumulation, len(units), min(case.window + 2, len(units))
    assert stats.slots == slots and 1 < stats.resident_peak <= slots
    sent = sum(u.grad_bytes for u in units) * passes
    assert stats.total.d2h_bytes == sent
    if case.mode == "block":
        # Each pass turns round on the last `slots` units; frozen ones also stay for the next pass.
        cold, warm = 2 * count - slots, 2 * (count - slots)
        fetches = cold + (passes - 1) * (warm if case.lora else cold)
        assert stats.total.fetches == fetches, (
            f"{stats.total.fetches} fetches, {fetches} by formula"
        )
        assert len({u.host_bytes for u in units}) == 1
        assert stats.total.h2d_bytes == fetches * units[0].host_bytes
    if hasattr(backend, "uploaded"):
        assert not backend.violations
        assert (backend.uploaded, backend.downloaded) == (stats.total.h2d_bytes, sent)


def check_empty(device: str) -> None:
    """Nothing of the device is alive, its adapters' optimizer state included."""
    gc.collect()
    if device == "sim":
        from tests.support import sim_device

        assert sim_device.allocated() == 0
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        assert torch.cuda.memory_allocated() == 0


@pytest.mark.parametrize("device, case", _params(MATRIX))
def test_streamed_training_equals_resident_training(device: str, case: Case):
    check(case, device)


@pytest.mark.parametrize("device, case", _params(FAMILIES))
def test_real_video_transformers_train_the_same_streamed(device: str, case: Case):
    check(case, device)


@pytest.mark.parametrize("tier", ["cpu", "sim"])
def test_the_default_subset_holds_every_kind_with_every_checkpointing_and_every_value(tier: str):
    toys = [c for c in COVERING[tier] if c.family == "toy"]
    assert len({(c.lora, c.reentrant) for c in toys}) == 6
    assert {c.window for c in toys} == {1, 2, 3} and {c.accumulation for c in toys} == {1, 2}
    assert {c.mode for c in toys} == {"block", "layer"}
    assert {c.family for c in COVERING[tier]} == {"toy", "wan", "ltx"}
