"""Results that were wrong without a word: each is right now, or refused."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload import budget
from dist_layerlr.offload.device import Immediate
from dist_layerlr.offload.masters import Unit, payload_bytes
from dist_layerlr.offload.streaming import Handle, stream_on
from dist_layerlr.offload.units import find_units
from tests.support.families import BLOCKS, toy_batch
from tests.support.toys import WIDTH
from tests.support.training import (
    Case,
    attach,
    loss_of,
    weights,
)

LORA, FULL = Case(lora=True), Case(lora=False)
UNSAMPLED = 1
"""An element of each weight that no stamp samples."""


def _fused_step(model: nn.Module) -> torch.optim.Optimizer:
    """One step that writes one element of each weight, and no version counter sees it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[UNSAMPLED] = 1.0
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0, fused=True)
    versions = [p._version for p in trained]
    optimizer.step()
    optimizer.zero_grad()
    assert [p._version for p in trained] == versions
    return optimizer


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_fused_step_behind_a_forward_that_had_no_backward_is_seen(device: str, grad: bool):
    found = []
    for streamed in (False, True):
        model: Any = FULL.model()
        handle = attach(model, FULL, device) if streamed else None
        with torch.set_grad_enabled(grad):
            model(**toy_batch(0))
            alone = model.blocks[1](torch.ones(2, WIDTH))
        _fused_step(model)
        with torch.no_grad():
            found.append((model.blocks[1](torch.ones(2, WIDTH)), model(**toy_batch(0))))
        assert not torch.equal(found[-1][0], alone)
        if handle is not None:
            handle.remove()
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("device", ["cpu"])
def test_a_write_that_no_optimizer_makes_is_seen_behind_a_forward_that_had_no_backward(device: str):
    model = FULL.model()
    with attach(model, FULL, device):
        before = model(**toy_batch(0))
        for p in model.parameters():
            p.data.view(-1)[UNSAMPLED] += 0.1
        after = model(**toy_batch(0))
        assert not torch.equal(after, before)
    assert torch.equal(after, model(**toy_batch(0)))


@pytest.mark.parametrize("device", ["cpu"])
def test_a_fused_step_between_forward_and_backward_is_refused(device: str):
    model = FULL.model()
    with attach(model, FULL, device):
        loss = loss_of(model, FULL, 0, device)
        _fused_step(model)
        with pytest.raises(OffloadError, match="changed in place between forward and backward"):
            loss.backward()


@pytest.mark.parametrize("device", ["cpu"])
def test_the_step_of_another_model_changes_nothing_here(device: str):
    model, other = FULL.model(), nn.Linear(3, 3)
    with attach(model, FULL, device) as handle:
        loss = loss_of(model, FULL, 0, device)
        before = handle.stats().total.fetches
        _fused_step(other)
        loss.backward()
        # The last units of the forward are still there: backward begins with them.
        assert handle.stats().total.fetches - before == BLOCKS - handle.stats().slots


def test_weights_that_share_memory_and_train_are_refused():
    model: Any = FULL.model()
    model.blocks[3].attn.to_k.weight.data = model.blocks[1].attn.to_k.weight.data
    with pytest.raises(OffloadError) as error:
        attach(model, FULL, "cpu")
    for part in ("blocks.1.attn.to_k.weight", "blocks.3.attn.to_k.weight", "share memory"):
        assert part in str(error.value)


@pytest.mark.parametrize("first", [2, 3])
def test_weights_that_share_a_part_of_their_memory_and_train_are_refused(first: int):
    model: Any = FULL.model()
    memory = torch.randn(WIDTH + 10, WIDTH)
    model.blocks[1].attn.to_k.weight.data = memory[:WIDTH]
    model.blocks[first].attn.to_k.weight.data = memory[10:]
    with pytest.raises(OffloadError, match=rf"blocks.1.*blocks.{first}.* share memory"):
        attach(model, FULL, "cpu")


def test_weights_that_lie_side_by_side_in_one_buffer_are_streamed():
    model: Any = FULL.model()
    memory = torch.randn(3 * WIDTH, WIDTH)
    for i, part in enumerate(memory.split(WIDTH)):
        model.blocks[i].attn.to_k.weight.data = part
    with attach(model, FULL, "cpu"):
        loss_of(model, FULL, 0, "cpu").backward()


def test_columns_of_one_buffer_are_streamed_and_refused_where_they_overlap():
    model: Any = FULL.model()
    memory = torch.randn(WIDTH, 3 * WIDTH)
    for i in range(3):
        model.blocks[i].attn.to_k.weight.data = memory[:, i * WIDTH : (i + 1) * WIDTH]
    with attach(model, FULL, "cpu"):
        loss_of(model, FULL, 0, "cpu").backward()
    model = FULL.model()
    model.blocks[0].attn.to_k.weight.data = memory[:, :WIDTH]
    model.blocks[1].attn.to_k.weight.data = memory[:, WIDTH - 1 : 2 * WIDTH - 1]
    with pytest.raises(OffloadError, match="share memory"):
        attach(model, FULL, "cpu")


def test_frozen_weights_that_share_memory_are_streamed():
    model: Any = LORA.model()
    for layer in (model.blocks[1].attn.to_k, model.blocks[3].attn.to_k):
        layer.weight.data = model.blocks[2].attn.to_k.weight.data
    with attach(model, LORA, "cpu"):
        loss_of(model, LORA, 0, "cpu").backward()


def test_the_default_device_does_not_move_the_masters():
    model = FULL.model()
    with torch.device("meta"):
        handle = stream_on(Immediate(torch.device("cpu")), model, FULL.policy())
    with handle:
        assert all(p.device.type == "cpu" for p in model.parameters())
        loss_of(model, FULL, 0, "cpu").backward()


def _in_flight(handle: Handle) -> int:
    """Copies to the device that have not read their masters yet."""
    backend: Any = handle._backend
    return len(backend._queue)


@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("case", [LORA, FULL], ids=["lora", "full"])
def test_no_copy_reads_the_masters_when_the_caller_may_write_them(case: Case, device: str):
    model: Any = case.model()
    with attach(model, case, device) as handle:
        with torch.no_grad():
            model.blocks[1](torch.ones(2, WIDTH))
            assert _in_flight(handle) == 0
            model.blocks[1].mlp[0](torch.ones(2, WIDTH))
            assert _in_flight(handle) == 0
            loss_of(model, case, 0, device)
            assert _in_flight(handle) == 0
        model.blocks[1](torch.ones(2, WIDTH))
        assert _in_flight(handle) == 1  # the next block's: gradients are on, backward may follow
        _fused_step(model)
        assert _in_flight(handle) == 0
        # A graph that ends at block 3: block 2 is fetched and not used.
        x = torch.ones(2, WIDTH, requires_grad=True)
        for block in model.blocks:
            x = block(x if block is not model.blocks[3] else x.detach().requires_grad_())
        x.sum().backward()
        assert _in_flight(handle) == 0


@pytest.mark.parametrize("device", ["cpu"])
def test_the_staging_thread_has_read_the_masters_when_the_caller_may_write_them(
    device: str, monkeypatch: pytest.MonkeyPatch
):
    unit = payload_bytes(find_units(FULL.model(), FULL.policy())[0], None)
    gradients = budget.grad_staging_bytes(find_units(FULL.model(), FULL.policy()))
    monkeypatch.setattr(budget, "MEBIBYTE", unit + gradients)  # one staging buffer
    reading: list[str] = []
    fill = Unit.fill

    def slow_fill(self: Unit, staging: torch.Tensor) -> torch.Tensor:
        reading.append(self.name)
        time.sleep(0.02)
        payload = fill(self, staging)
        reading.remove(self.name)
        return payload

    monkeypatch.setattr(Unit, "fill", slow_fill)
    model: Any = FULL.model()
    with attach(model, FULL, device, pinned_pool_mb=1), torch.no_grad():
        model.blocks[1](torch.ones(2, WIDTH))  # block 2 is fetched behind it
        assert reading == []


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("device", ["sim"])
def test_a_backward_that_passes_streamed_weights_by_is_refused(reentrant: bool | None, device: str):
    case = Case(lora=False, reentrant=reentrant)
    model: Any = case.model()
    with attach(model, case, device):
        trained = [p for p in model.parameters() if p.requires_grad]
        with pytest.raises(
            OffloadError, match=r"backward\(inputs=\.\.\.\) gives streamed weights no"
        ):
            loss_of(model, case, 0, device).backward(inputs=trained)
        model.zero_grad()
        loss_of(model, case, 1, device).backward()
        assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("device", ["sim"])
def test_the_gradient_of_an_input_and_a_weight_behind_detach_are_no_errors(device: str):
    model: Any = FULL.model()
    x = toy_batch(0)["x"].to(device).requires_grad_()
    with attach(model, FULL, device):
        (found,) = torch.autograd.grad(model(x).square().mean(), x)
        assert torch.isfinite(found.cpu()).all()
        loss_of(model, FULL, 1, device).backward()
        layer = model.blocks[5].mlp[2]
        layer.forward = lambda x: nn.functional.linear(x, layer.weight.detach(), layer.bias)
        loss_of(model, FULL, 1, device).backward()


@pytest.mark.parametrize("device", ["cpu"])
def test_a_backward_of_some_inputs_gives_gradients_where_nothing_changes_device(device: str):
    model: Any = FULL.model()
    with attach(model, FULL, device):
        trained = [p for p in model.parameters() if p.requires_grad]
        loss_of(model, FULL, 0, device).backward(inputs=trained)
        assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("device", ["cpu"])
def test_a_view_of_a_trained_weight_that_is_kept_still_shows_that_weight(device: str):
    model: Any = FULL.model()
    layer = model.blocks[3].mlp[0]
    kept: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda *_: kept.append(layer.weight.t()))
    with attach(model, FULL, device) as handle:
        loss_of(model, FULL, 0, device).backward()
        hook.remove()
        wanted = weights(model)["blocks.3.mlp.0.weight"].t()
        with torch.no_grad():
            model(**toy_batch(1))
            assert torch.equal(kept[0], wanted)
        model.zero_grad()
        loss_of(model, FULL, 1, device).backward()
        assert torch.equal(kept[0], wanted)
        layer.forward = lambda x: nn.functional.linear(x, kept[0].t(), layer.bias)
        with pytest.raises(OffloadError, match=r"view of a weight of blocks\.3 was kept"):
            loss_of(model, FULL, 2, device)
        del layer.forward
        kept.clear()
        loss_of(model, FULL, 2, device).backward()
        assert handle._engine is not None and not handle._engine.copies._aside


@pytest.mark.parametrize("device", ["cpu"])
def test_kept_views_of_trained_weights_that_hold_every_slot_are_named(device: str):
    model: Any = FULL.model()
    kept: list[torch.Tensor] = []
    for i in (1, 3, 5):
        layer = model.blocks[i].mlp[0]
        layer.register_forward_hook(lambda m, *_: kept.append(m.weight.t()) if grad() else None)
    grad = torch.is_grad_enabled
    with attach(model, FULL, device):
        with pytest.raises(OffloadError, match=r"No slot for blocks.*views of the weights of"):
            for step in range(3):
                loss_of(model, FULL, step, device).backward()
        kept.clear()
        model(**toy_batch(0))
