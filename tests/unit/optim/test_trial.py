"""The trial of an optimizer on scratch parameters."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import dist_layerlr as dl
from dist_layerlr.optim.trial import Verdict, remember, try_out
from dist_layerlr.sharders import Layout
from tests.support.naive import CONFIG, fill_grads, make_model
from tests.support.optimizers import (
    ClippedByNorm,
    CountsInGroup,
    CountsInItself,
    Harmless,
    Make,
    Muon,
    OneRate,
    Plain,
    Wrapper,
)

LAYOUTS = {
    "whole": Layout(name="ddp"),
    "fsdp1": Layout(name="fsdp1", shards=True),
    "zero 2": Layout(name="zero", stage=2, shards=True, flat=True),
    "zero 3": Layout(name="zero", stage=3, shards=True, flat=True),
}


class Blockwise(torch.optim.SGD):
    """Scales the gradient by the largest element of each block of 2,048, from 4,096 on."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel() >= 4096:
                    for block in param.grad.reshape(-1).split(2048):
                        block.div_(block.abs().max())
        return super().step(closure)


class LateMixer(torch.optim.SGD):
    """Works element by element for 25 steps."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                count = self.state[param].setdefault("count", 0)
                self.state[param]["count"] = count + 1
                if count >= 25:
                    param.grad.div_(param.grad.norm())
        return super().step(closure)


class Needs(torch.optim.AdamW):
    """Cannot be built from its defaults."""

    def __init__(self, params: Any, secret: object):
        assert secret == "told"
        super().__init__(params)


def verdict(make: Make, layout: str, *, known: bool = True) -> Verdict:
    params = [nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))]
    optimizer = make([{"params": [p], "lr": 1e-3, "name": str(p.ndim)} for p in params])
    if known:
        remember(optimizer, make)
    return try_out(optimizer, LAYOUTS[layout], params, [(6, 6), (6,)])


ELEMENTWISE: dict[str, Make] = {
    "AdamW": torch.optim.AdamW,
    "a subclass": Harmless,
    "another name": Muon,
    "a wrapper": lambda groups: Wrapper(torch.optim.AdamW(groups)),
    "RAdam, which moves nothing at first": torch.optim.RAdam,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_works_element_by_element_may_be_cut_in_any_way(name: str, layout: str) -> None:
    found = verdict(ELEMENTWISE[name], layout)
    assert found.tried and found.fault is None


MIXERS: dict[str, Make] = {
    "a norm over everything": ClippedByNorm,
    "Muon": Plain,
    "a wrapper of Muon": lambda groups: Wrapper(Plain(groups)),
    "Adafactor under another name": type("AdamW", (torch.optim.Adafactor,), {}),
    "blocks of large tensors": partial(Blockwise, momentum=0.9),
    "from the 25th step on": LateMixer,
}


@pytest.mark.parametrize("name", MIXERS)
def test_what_mixes_elements_may_train_whole_parameters_alone(name: str) -> None:
    assert verdict(MIXERS[name], "whole").fault is None
    for layout in ("fsdp1", "zero 2"):
        found = verdict(MIXERS[name], layout)
        assert found.fault is not None and "of its move away" in found.fault, layout
        assert found.deviation > 1e-3


def test_a_counter_in_the_group_is_right_until_a_step_takes_several_turns() -> None:
    assert verdict(CountsInGroup, "zero 2").fault is None
    assert "of its move away" in str(verdict(CountsInGroup, "zero 3").fault)


def test_a_counter_in_the_optimizer_is_wrong_where_a_step_takes_a_turn_for_each_group() -> None:
    assert verdict(CountsInItself, "fsdp1").fault is None
    for stage in ("zero 2", "zero 3"):
        assert "of its move away" in str(verdict(CountsInItself, stage).fault)


def test_one_rate_for_all_groups_is_a_fault_under_every_sharder() -> None:
    for layout in LAYOUTS:
        assert "5 times as high moved scratch weights 1.0" in str(verdict(OneRate, layout).fault)


def test_settings_are_tried_not_the_class() -> None:
    assert verdict(partial(ClippedByNorm), "zero 2").fault is not None
    assert verdict(partial(torch.optim.SGD, momentum=0.9), "zero 2").fault is None
    made: list[int] = []

    def make(groups: Any) -> torch.optim.Optimizer:
        made.append(len(groups))
        return torch.optim.AdamW(groups, betas=(0.8, 0.9))

    verdict(make, "fsdp1")
    first = len(made)
    verdict(make, "fsdp1")
    assert first > 1 and len(made) == first + 1  # the second time it is only built


class FlatRate(CountsInItself):
    """A setting of its own, beside the counters in itself and in its groups."""

    def __init__(self, params: Any):
        super().__init__(params)
        self.flat = False


def test_counters_are_no_settings_and_settings_that_change_are_tried_again() -> None:
    made: list[int] = []

    def make(groups: Any) -> torch.optim.Optimizer:
        made.append(len(groups))
        return FlatRate(groups)

    model = make_model()
    plan = dl.plan_model(model, CONFIG)
    optimizer = dl.attach(plan, model, make)
    tried = len(made)
    for _ in range(3):
        fill_grads(model)
        optimizer.step()
        dl.verify(plan, model, optimizer)
    assert tried > 1 and len(made) == tried
    optimizer.flat = True
    dl.verify(plan, model, optimizer)
    assert len(made) > tried


def test_fsdp1_hands_shards_over_in_one_way_so_nothing_else_is_built_before_a_refusal() -> None:
    made: list[int] = []

    def make(groups: Any) -> torch.optim.Optimizer:
        made.append(sum(param.numel() for group in groups for param in group["params"]))
        return ClippedByNorm(groups)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = make_model()
        plan = dl.plan_model(net, CONFIG)
        elements = sum(entry.numel for entry in plan.entries.values())
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(net, use_orig_params=True, device_id=cpu)
        with pytest.raises(dl.ConfigError, match="ClippedByNorm under fsdp1"):
            dl.attach(plan, model, make)
    finally:
        dist.destroy_process_group()
    assert made.count(elements) == 1


def test_an_optimizer_that_others_built_is_built_anew_from_its_settings() -> None:
    assert verdict(torch.optim.AdamW, "zero 2", known=False).tried
    assert verdict(torch.optim.Adafactor, "zero 2", known=False).fault is not None
    untold = verdict(partial(Needs, secret="told"), "zero 2", known=False)
    assert not untold.tried and "could not be tried" in untold.line


def test_a_trial_leaves_no_trace() -> None:
    model = make_model()
    before = [param.detach().clone() for param in model.parameters()]
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    dl.attach(dl.plan_model(model, CONFIG), model, partial(torch.optim.AdamW, betas=(0.7, 0.8)))
    assert torch.equal(torch.rand(4), wanted)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_verify_names_an_optimizer_that_was_never_attached() -> None:
    model = make_model()
    plan = dl.plan_model(model, {"learning_rate": 1e-3, "per_layer_lr": {"enabled": False}})
    optimizer = OneRate(model.parameters(), lr=1e-3)
    with pytest.raises(dl.PlanMismatch, match="OneRate, tried on whole parameters"):
        dl.verify(plan, model, optimizer)


def test_the_proof_says_what_was_tried() -> None:
    model = make_model()
    plan = dl.plan_model(model, CONFIG)
    proof = dl.verify(plan, model, dl.attach(plan, model, torch.optim.AdamW))
    assert proof.trial == "AdamW heeds the rate of each group"
    assert proof.trial in proof.line()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_one_number_can_be_tried(layout: str) -> None:
    gate = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.AdamW([{"params": [gate], "lr": 1e-3, "name": "gate"}])
    found = try_out(optimizer, LAYOUTS[layout], [gate], [()])
    assert found.tried and found.fault is None


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_deep_copy_of_a_segmented_optimizer_goes_on_as_the_original_does(
    steps_before: int,
) -> None:
    model = make_model()
    plan = dl.plan_model(model, CONFIG)
    optimizer = dl.attach(plan, model, torch.optim.AdamW, emission="segmented")
    for _ in range(steps_before):
        fill_grads(model)
        optimizer.step()
    other_model, other = copy.deepcopy((model, optimizer))
    dl.verify(plan, other_model, other)
    for net, stepped in ((model, optimizer), (other_model, other)):
        fill_grads(net)
        stepped.step()
    pairs = zip(model.parameters(), other_model.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
