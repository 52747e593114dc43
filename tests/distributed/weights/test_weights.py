"""``Adapter.weights``: every element of every parameter and persistent buffer, frozen ones
included, live and in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from dist_layerlr.sharders import sharder_of
from tests.support.drivers import SHARDERS, Native, Wrap, Zero, fsdp1, fsdp2, start_deepspeed
from tests.support.parity import Recipe, Weights
from tests.support.ranks import run_ranks
from tests.support.toys import Transformer

BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}, "zero_force_ds_cpu_optimizer": False}
NATIVE: dict[str, Wrap] = {
    "none": lambda model: model,
    **SHARDERS,
    "fsdp1 SHARD_GRAD_OP": functools.partial(fsdp1, strategy="SHARD_GRAD_OP"),
    "fsdp2 on cpu": functools.partial(fsdp2, offload_policy=CPUOffloadPolicy(pin_memory=False)),
}
ZERO: dict[str, Callable[[Recipe], Any]] = {
    **{f"zero {s} bf16": functools.partial(Zero, stage=s, **BF16) for s in (0, 1, 2, 3)},
    "zero 1 bf16, fp32 sums": functools.partial(
        Zero, stage=1, **BF16, data_types={"grad_accum_dtype": "fp32"}
    ),
    "zero 3 offload": functools.partial(Zero, stage=3, **OFFLOAD),
    "zero 3": functools.partial(Zero, stage=3),
}


class WithBuffers(Recipe):
    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("counted", torch.arange(5.0))
        model.register_buffer("scratch", torch.zeros(2), persistent=False)
        return model


def make(name: str, recipe: Recipe) -> Any:
    return Native(NATIVE[name], recipe) if name in NATIVE else ZERO[name](recipe)


def assembled(driver: Any) -> Weights:
    """Whole tensors, put together from what all ranks say they hold; every element ``replicas``
    times."""
    mine = sharder_of(driver.model).weights()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        gathered, [(w.name, w.start, w.tensor.float().clone(), w.shape, w.replicas) for w in mine]
    )
    whole: Weights = {}
    counts: Weights = {}
    for name, start, tensor, shape, replicas in (w for rank in gathered for w in rank):
        size = torch.Size(shape).numel()
        flat, count = (
            whole.setdefault(name, torch.zeros(size)),
            counts.setdefault(name, torch.zeros(size)),
        )
        flat[start : start + tensor.numel()] = tensor
        count[start : start + tensor.numel()] += 1 / replicas
    assert all(bool((c == 1).all()) for c in counts.values()), [
        n for n, c in counts.items() if bool((c != 1).any())
    ]
    return {n: t.view(next(w.shape for w in mine if w.name == n)) for n, t in whole.items()}


def check_one(name: str) -> None:
    recipe = WithBuffers()
    driver = make(name, recipe)
    wanted = dict(recipe.model().state_dict())
    del wanted["tie_b.weight"]
    low = torch.bfloat16 if "bf16" in name else torch.float32
    found = assembled(driver)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value.to(low).float()), key
    weights = {w.name: w for w in sharder_of(driver.model).weights()}
    assert weights["tie_a.weight"].aliases == ("tie_b.weight",)
    assert [n for n, w in weights.items() if not w.trainable] == [
        "still.weight",
        "still.bias",
        "counted",
    ]
    assert [n for n, w in weights.items() if w.is_buffer] == ["counted"]
    for value in weights.values():
        value.tensor.mul_(0.5)
        value.write_home()
    if name in NATIVE:
        sharder_of(driver.model).refresh()
        assert all(torch.equal(value, wanted[key] / 2) for key, value in driver.full().items())


def check_refresh(name: str) -> None:
    """Masters written, then refreshed: low-precision parameters follow, and the forward sees
    them."""
    driver = make(name, Recipe())
    sharder = sharder_of(driver.model)
    before = assembled(driver)
    for piece in sharder.pieces(None).pieces:
        piece.of(piece.owner).mul_(0.5)
    for weight in sharder.weights():
        if not weight.trainable:
            weight.tensor.mul_(0.5)
    sharder.refresh()
    after = assembled(driver)
    assert all(torch.equal(after[key], before[key] / 2) for key in before), name
    inputs = torch.randn(2, 7)
    plain = Transformer()
    plain.load_state_dict({**after, "tie_b.weight": after["tie_a.weight"]})
    with torch.no_grad():
        seen = driver.model(inputs.bfloat16() if "bf16" in name else inputs).float()
    assert torch.allclose(seen, plain(inputs), atol=3e-2 if "bf16" in name else 1e-6), name


def on_rank(rank: int, world_size: int, names: list[str]) -> None:
    if names[0] in ZERO:
        start_deepspeed()
    for name in names:
        check_one(name)
        if name in ZERO:
            check_refresh(name)


@pytest.mark.parametrize("ranks", [2, 3])
def test_torchs_own_sharders_show_every_element_live(ranks: int) -> None:
    run_ranks(on_rank, ranks, list(NATIVE))


def test_zero_shows_every_element_live_and_follows_its_masters() -> None:
    run_ranks(on_rank, 2, list(ZERO))


def one_process(rank: int, world_size: int) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    weight = sharder_of(model).weights()[0]
    assert weight.home is not None
    assert torch.equal(weight.tensor.view(weight.shape), before)
    weight.tensor.add_(1.0)
    weight.write_home()
    assert torch.equal(model.weight, before + 1.0)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_layout_without_a_flat_view_is_written_back() -> None:
    run_ranks(one_process, 1)
