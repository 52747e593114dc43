"""What cannot be streamed is refused before anything changes, in one line that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dist_layerlr.errors import LayerLRError, OffloadError
from dist_layerlr.offload import StreamPolicy, stream
from tests.support.families import BLOCKS, MIN_NUMEL, toy
from tests.support.training import (
    Case,
    assert_equal,
    attach,
    identity,
    loss_of,
    make_optimizer,
    train,
    weights,
)

FULL, LORA = Case(lora=False), Case(lora=True)


def _tied(model: Any) -> None:
    model.blocks[4].attn.to_q.weight = model.blocks[1].attn.to_q.weight


def _zero(model: Any) -> None:
    model.blocks[2].attn.to_q.weight.ds_id = 7


def _meta(model: Any) -> None:
    model.blocks[2].to("meta")


def _subclass(model: Any) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    weight = model.blocks[2].attn.to_q.weight
    model.blocks[2].attn.to_q.weight = nn.Parameter(TwoTensor(weight.data, weight.data.clone()))


def _compiled(model: Any) -> None:
    model.blocks[2].compile(backend="eager")


def _as(dtype: torch.dtype) -> Callable[[Any], None]:
    def cast(model: Any) -> None:
        model.requires_grad_(False)
        model.blocks[2].attn.to_q.weight.data = model.blocks[2].attn.to_q.weight.data.to(dtype)

    return cast


NOTHING: Callable[[Any], None] = lambda model: None  # noqa: E731
REFUSED: dict[str, tuple[Callable[[Any], None], dict[str, Any], list[str]]] = {
    "no layer is large": (NOTHING, {"min_numel": 10**6}, ["min_numel=1000000", "Lower min_numel"]),
    "no module is large": (
        NOTHING,
        {"min_numel": 10**6, "mode": "layer"},
        ["min_numel=1000000", "Lower"],
    ),
    "tied across blocks": (
        _tied,
        {},
        ["blocks.1.attn.to_q.weight", "blocks.4.attn.to_q.weight", "Untie"],
    ),
    "ZeRO-3": (_zero, {}, ["blocks.2.attn.to_q.weight", "offload_param"]),
    "meta": (_meta, {}, ["blocks.2", "meta device", "Load its weights"]),
    "tensor subclass": (_subclass, {}, ["blocks.2.attn.to_q.weight", "TwoTensor"]),
    "compiled call": (
        _compiled,
        {},
        ["'blocks.2'", "block.forward = torch.compile(block.forward)"],
    ),
    "fp8 in 8 bits": (
        _as(torch.float8_e4m3fn),
        {"host_dtype": "float8_e4m3fn"},
        ["blocks.2.attn.to_q.weight is float8_e4m3fn", "host_dtype=None"],
    ),
    "int8 in 8 bits": (
        _as(torch.int8),
        {"host_dtype": "int8"},
        ["blocks.2.attn.to_q.weight is int8", "host_dtype=None"],
    ),
    "no files": (lambda m: m.requires_grad_(False), {"host": "file"}, ["files=FOLDER"]),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("device", ["cpu"])
def test_a_model_that_cannot_be_streamed_is_refused_unchanged(name: str, device: str):
    damage, policy, words = REFUSED[name]
    model = toy()
    damage(model)
    before, optimizer = (
        [(p, p.data_ptr(), p.device) for p in model.parameters()],
        make_optimizer(model),
    )
    held = identity(model, optimizer)
    with pytest.raises(LayerLRError) as error:
        stream(
            model,
            StreamPolicy(**{"min_numel": MIN_NUMEL, **policy}),
            device=device,
            optimizer=optimizer,
        )
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert all(p.data_ptr() == pointer and p.device == home for p, pointer, home in before)
    assert identity(model, optimizer) == held
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("device", ["cpu"])
def test_a_model_without_blocks_is_sent_to_layer_mode(device: str):
    model = nn.Sequential(nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 20))
    with pytest.raises(OffloadError, match="No blocks to stream in Sequential.*mode='layer'"):
        stream(model, StreamPolicy(min_numel=MIN_NUMEL), device=device)
    with stream(model, StreamPolicy(min_numel=MIN_NUMEL, mode="layer"), device=device) as handle:
        assert [u.name for u in handle.units] == ["0", "2"]


@pytest.mark.parametrize("device", ["cpu"])
def test_a_pool_smaller_than_one_block_says_how_large_it_must_be(device: str):
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(600, 600)}) for _ in range(3))}
    )
    model.requires_grad_(False)
    with pytest.raises(
        OffloadError, match=re.escape("pinned_pool_mb=1: smaller than what one unit (blocks.0)")
    ) as error:
        stream(model, StreamPolicy(pinned_pool_mb=1), device=device)
    assert "Must be >= 2." in str(error.value)
    stream(model, StreamPolicy(pinned_pool_mb=2), device=device).remove()


@pytest.mark.parametrize("device", ["cpu"])
def test_a_second_attach_is_refused_also_from_above_and_below(device: str):
    model: Any = toy()
    with attach(model, FULL, device):
        for other in (model, nn.Sequential(model)):
            with pytest.raises(OffloadError, match="streamed already.*remove"):
                attach(other, FULL, device)
        train(model, make_optimizer(model), FULL, device, steps=1)


@pytest.mark.parametrize("case", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_live_graph_at_attach_is_refused(case: Case, device: str):
    model = case.model()
    loss = loss_of(model, case, 0, "cpu")
    with pytest.raises(OffloadError, match="held by a live autograd graph"):
        attach(model, case, device)
    loss.backward()
    del loss
    attach(model, case, device).remove()


@pytest.mark.parametrize("device", ["cpu"])
def test_wrappers_that_own_parameters_are_refused_by_name(device: str):
    model = toy()
    with pytest.raises(OffloadError, match="DataParallel: use DistributedDataParallel"):
        stream(nn.DataParallel(model), StreamPolicy(min_numel=MIN_NUMEL), device=device)


@pytest.mark.parametrize("device", ["cpu"])
def test_a_device_without_ordered_copies_is_refused(device: str):
    for other, words in {
        "meta": "Invalid device='meta'. Must be 'cpu', or torch's accelerator",
        "mps": "Invalid device='mps'. Its memory is the host's",
    }.items():
        with pytest.raises(OffloadError, match=words):
            stream(toy(), StreamPolicy(min_numel=MIN_NUMEL), device=other)


def _swap(model: Any) -> None:
    model.blocks[0].attn.to_q.base_layer.weight = nn.Parameter(torch.zeros(12, 12))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cast": (lambda m: m.double(), "moved or cast"),
    "moved": (lambda m: m.blocks[3].attn.to_q._apply(lambda t: t.clone()), "moved or cast"),
    "assigned": (
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        "replaced",
    ),
    "swapped": (
        lambda m: setattr(
            m.blocks[0].attn.to_q.base_layer, "weight", nn.Parameter(torch.zeros(12, 12))
        ),
        "replaced",
    ),
    "unfrozen": (lambda m: m.requires_grad_(True), "unfrozen"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("device", ["cpu"])
def test_a_model_changed_under_a_running_stream_is_refused_at_its_next_forward(
    name: str, device: str
):
    change, word = CHANGES[name]
    model = LORA.model()
    with attach(model, LORA, device):
        loss_of(model, LORA, 0, device).backward()
        change(model)
        with pytest.raises(OffloadError, match=rf"Parameter blocks.\d.*{word}.*handle.remove\(\)"):
            loss_of(model, LORA, 0, device)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("device", ["sim"])
def test_a_resident_parameter_that_left_the_device_is_named(device: str):
    model = LORA.model()
    with attach(model, LORA, device):
        model.to("cpu")
        with pytest.raises(OffloadError, match="emb.weight was moved to cpu.*Move it back to sim"):
            loss_of(model, LORA, 0, device)


@pytest.mark.parametrize("device", ["cpu"])
def test_groups_that_lose_or_gain_parameters_are_noticed(device: str):
    model = FULL.model()
    optimizer = make_optimizer(model)
    with stream(model, FULL.policy(), optimizer=optimizer, device=device) as handle:
        train(model, optimizer, FULL, device)
        optimizer.param_groups[2]["params"][0] = nn.Parameter(torch.zeros(3))
        with pytest.raises(OffloadError, match="group 2 of the optimizer changed"):
            loss_of(model, FULL, 0, device)
        with pytest.raises(OffloadError, match="group 2"):
            handle.check()


@pytest.mark.parametrize("device", ["cpu"])
def test_a_failure_half_way_gives_the_model_back(device: str):
    from dist_layerlr.offload.streaming import stream_on
    from tests.support.adversary import Adversary

    class Refusing(Adversary):
        def pin(self, tensor: torch.Tensor) -> None:
            if len(self.locked) == BLOCKS - 2:
                raise OffloadError("no more locked memory")
            super().pin(tensor)

    model = FULL.model()
    before, backend = weights(model), Refusing(device)
    with pytest.raises(OffloadError, match="no more locked"):
        stream_on(backend, model, FULL.policy())
    assert_equal(weights(model), before)
    assert backend.locked == []
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    attach(model, FULL, device).remove()


def test_what_runs_on_a_card_is_marked_so_and_nothing_else(request: pytest.FixtureRequest):
    items = [item for item in request.session.items if "/offload/test_" in item.nodeid]
    assert items
    for item in items:
        marked = item.get_closest_marker("cuda") is not None
        full = item.get_closest_marker("full") is not None
        # The name of a test on a card begins its parameters with the device, or ends them with it.
        assert marked == (not full and "cuda" in item.name.partition("[")[2])
