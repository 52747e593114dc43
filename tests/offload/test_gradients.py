"""Gradients on the host: in memory that is kept, sent unit by unit, and never under a holder's
feet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_layerlr.offload import grad_memory
from tests.support.families import BLOCKS
from tests.support.toys import WIDTH
from tests.support.training import (
    Case,
    assert_equal,
    attach,
    backend_of,
    loss_of,
    make_optimizer,
    resident,
    train,
    weights,
)

FULL, ACCUMULATED = Case(lora=False), Case(lora=False, accumulation=3)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _kept_over_steps(model: nn.Module, device: str) -> dict[str, Tensor]:
    """Gradients of four steps, that the caller holds while the next ones are computed."""
    held: dict[str, Tensor] = {}
    for step in range(4):
        loss_of(model, FULL, step, device).backward()
        held |= {f"{name} {step}": g for name, g in _gradients(model).items()}
        model.zero_grad(set_to_none=True)
    return {name: g.detach().cpu() for name, g in held.items()}


def gradients_that_are_kept(device: str) -> None:
    wanted = _kept_over_steps(FULL.model().to(device), device)
    model = FULL.model()
    with attach(model, FULL, device):
        assert_equal(_kept_over_steps(model, device), wanted)


@pytest.mark.parametrize("device", ["cpu", "sim", "races"])
def test_a_gradient_that_the_caller_keeps_is_not_overwritten(device: str):
    if device == "races":
        from tests.support import races  # noqa: F401  registers `sim`

        model, twin = FULL.model(), FULL.model().to("sim")
        with attach(model, FULL, device) as handle:
            found = _kept_over_steps(model, "sim")
            handle._backend.races.check()
        assert_equal(found, _kept_over_steps(twin, "sim"))
    else:
        gradients_that_are_kept(device)


def three_uses_in_one_pass(device: str) -> None:
    """One block runs three times, with a gradient that is there already."""

    def script(model: Any) -> dict[str, Tensor]:
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(3, WIDTH, generator=generator).to(device).requires_grad_()
            for index in (0, 1, 2, 1, 3, 1):
                x = model.blocks[index](x)
            (x * 3).square().sum().backward()
        return {n: g.detach().cpu().clone() for n, g in _gradients(model).items()}

    wanted = script(FULL.model().to(device))
    model = FULL.model()
    with attach(model, FULL, device):
        assert_equal(script(model), wanted)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_block_that_runs_three_times_has_its_gradients_summed_as_without_streaming(device: str):
    three_uses_in_one_pass(device)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("case", [FULL, ACCUMULATED], ids=["one", "accumulated"])
def test_gradients_lie_in_memory_that_is_kept(case: Case, device: str):
    model = case.model()
    optimizer = make_optimizer(model)
    seen: set[int] = set()
    with attach(model, case, device) as handle:
        streamed = set(handle.streamed_names())
        weights = [p for n, p in model.named_parameters() if n in streamed]
        for step in range(4):
            for micro in range(case.accumulation):
                loss_of(model, case, 3 * step + micro, device).backward()
            seen |= {p.grad.data_ptr() for p in weights if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == len(weights)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("most, groups", [(1 << 26, 1), (1, 5)])
def test_the_gradients_of_a_unit_are_sent_together_unless_they_are_large(
    most: int, groups: int, device: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grad_memory, "GROUP_BYTES", most)
    wanted, _, losses = resident(FULL, device)
    model, backend = FULL.model(), backend_of(device)
    calls: list[int] = []
    download = backend.download
    monkeypatch.setattr(
        backend, "download", lambda to, of: (calls.append(len(to)), download(to, of))[1]
    )
    from dist_layerlr.offload.streaming import stream_on

    with stream_on(backend, model, FULL.policy()):
        assert train(model, make_optimizer(model), FULL, device) == losses
    assert_equal(weights(model), wanted)
    assert len(calls) == 3 * BLOCKS * groups and set(calls) == {5 // groups}


@pytest.mark.parametrize(
    "units, capacity",
    [
        ([], 0),
        ([[]], 0),
        ([[100, 300]], 256 + 512),
        ([[100], [40 << 20, 40 << 20]], 64 << 20),
        ([[100 << 20, 100 << 20]], 100 << 20),
    ],
)
def test_a_group_is_a_unit_or_64_mib_or_one_weight(units: list[list[int]], capacity: int):
    assert grad_memory.group_capacity(units) == capacity
