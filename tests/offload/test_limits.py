"""What a streamed model refuses, what it keeps alive, and what it leaves behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from dist_layerlr.errors import OffloadError
from tests.offload.test_semantics import (
    FULL,
    LORA,
    ON_CPU,
)
from tests.support.families import BLOCKS
from tests.support.training import (
    Case,
    assert_equal,
    attach,
    loss_of,
    weights,
)


@ON_CPU
def test_weights_changed_between_forward_and_backward_are_refused(device: str):
    model = FULL.model()
    with attach(model, FULL, device) as handle:
        optimizer = torch.optim.SGD(
            [p for n, p in model.named_parameters() if n in set(handle.streamed_names())], lr=0.1
        )
        loss = loss_of(model, FULL, 0, device)
        loss_of(model, FULL, 1, device).backward()
        optimizer.step()
        with pytest.raises(OffloadError, match="changed in place between forward and backward"):
            loss.backward()


@ON_CPU
def test_gradients_of_gradients_are_refused(device: str):
    model = FULL.model()
    with attach(model, FULL, device), pytest.raises(OffloadError, match="create_graph"):
        loss_of(model, FULL, 0, device).backward(create_graph=True)


@ON_CPU
def test_a_streamed_model_is_not_copied(device: str):
    model = LORA.model()
    with attach(model, LORA, device), pytest.raises(OffloadError, match="state_dict"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def check_memory_of_a_graph(device: str, reentrant: bool | None) -> None:
    """A live graph takes as much of the device as a resident model's, its weights left out."""
    from tests.support import sim_device

    case = Case(lora=True, reentrant=reentrant)
    model = case.model().to(device)
    before = sim_device.allocated()
    loss = loss_of(model, case, 0, device)
    alive = sim_device.allocated() - before
    del loss, model
    model = case.model()
    handle = attach(model, case, device)
    before = sim_device.allocated()
    loss = loss_of(model, case, 0, device)
    streamed = sim_device.allocated() - before
    loss.backward()
    handle.remove()
    assert streamed == alive


@pytest.mark.parametrize(
    "reentrant", [None, True, False], ids=["plain", "reentrant", "nonreentrant"]
)
@pytest.mark.parametrize("device", ["sim"])
def test_a_live_graph_keeps_no_weight_and_checkpoints_still_drop_activations(
    reentrant: bool | None, device: str
):
    check_memory_of_a_graph(device, reentrant)


@ON_CPU
def test_remove_leaves_plain_tensors_and_no_hooks(device: str):
    model = LORA.model()
    before = weights(model)
    handle = attach(model, LORA, device)
    loss_of(model, LORA, 0, device).backward()
    for _ in range(2):
        handle.remove()
    with pytest.raises(OffloadError, match="removed"):
        handle.stats()
    assert_equal(weights(model), before)
    for p in model.parameters():
        assert p.untyped_storage().nbytes() == p.nbytes and p.device.type == "cpu"
        assert not p._backward_hooks and not p._post_accumulate_grad_hooks
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    attach(model, LORA, device).remove()


@ON_CPU
def test_stats_tell_what_was_moved_since_the_last_call(device: str):
    model = FULL.model()
    with attach(model, FULL, device) as handle:
        loss_of(model, FULL, 0, device).backward()
        first = handle.stats()
        loss_of(model, FULL, 1, device).backward()
        second = handle.stats()
    assert first.recent == first.total
    assert second.recent.fetches == second.total.fetches - first.total.fetches == 2 * BLOCKS - 3
    assert second.recent.d2h_bytes == sum(u.grad_bytes for u in handle.units)


@ON_CPU
def test_backward_after_remove_says_so(device: str):
    model = LORA.model()
    handle = attach(model, LORA, device)
    loss = loss_of(model, LORA, 0, device)
    handle.remove()
    with pytest.raises(OffloadError, match="handle was removed"):
        loss.backward()


@pytest.mark.parametrize("backward", [True, False])
@ON_CPU
def test_a_model_that_is_dropped_without_remove_is_freed(device: str, backward: bool):
    model = LORA.model()
    seen = weakref.ref(model)
    handle = attach(model, LORA, device)
    loss = loss_of(model, LORA, 0, device)
    if backward:
        loss.backward()
    del model, handle, loss
    gc.collect()
    assert seen() is None
