"""What a step did to whole matrices is seen, whoever steps them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dist_layerlr
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.optim import param_groups, whole
from dist_layerlr.ranks import RankFailure, everyone
from tests.support import optimizers
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.naive_deepspeed import silence
from tests.support.several import DECAY, LAYOUTS, LR, MAKES, NET, TIMES, Run, adamw, net

cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    yield cases.run(request)


@cases
def test_every_name_is_seen_at_its_rate_in_every_layout(at: At) -> None:
    for layout in LAYOUTS:
        with silence():
            run = Run(NET, layout)
            run.train(1)
            run.backward(1)
            with dist_layerlr.effect_check(run.plan, run.model, run.optimizer) as rates:
                run.update()
        seen: dict[str, float] = {}
        for row in everyone(dict(rates)):
            seen |= row
        assert seen.keys() == run.names, layout
        wanted = {n: TIMES * LR * (2 if "mlp" in n else 1) for n in seen if "qkv.weight" in n}
        assert {n: seen[n] for n in wanted} == pytest.approx(wanted, rel=1e-3)


@cases
def test_matrices_that_move_at_another_rate_are_named(at: At) -> None:
    run = Run(NET, "fsdp2")
    run.backward(0)
    right = whole.adjusted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "adjusted", lambda shape, rule: 1.1 * right(shape, rule))
        with pytest.raises(PlanMismatch, match=r"qkv.weight: planned lr 0.003, the step moved it"):
            with dist_layerlr.effect_check(run.plan, run.model, run.optimizer):
                run.update()


@cases
def test_a_step_that_does_not_orthogonalise_is_named(at: At) -> None:
    """Signs in place of the orthogonal factor: what Adam's first step is."""
    run = Run(NET, "fsdp1_flat")
    run.backward(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "orthogonalise", lambda asked: [matrix.sign() for matrix, *_ in asked])
        with pytest.raises(PlanMismatch, match="the step is not orthogonal"):
            with dist_layerlr.effect_check(run.plan, run.model, run.optimizer):
                run.update()


@cases
def test_adamw_under_the_name_of_muon_is_found_by_what_it_does(at: At) -> None:
    model = net()
    plan = dist_layerlr.plan_model(model, NET.config)
    optimizer = optimizers.Muon(param_groups(plan, model))
    NET.loss(model, 0, slice(None)).backward()
    with pytest.raises(PlanMismatch, match="the step is not orthogonal"):
        with dist_layerlr.effect_check(plan, model, optimizer):
            optimizer.step()


@cases
def test_verify_says_who_steps_what_and_in_which_precision(at: At) -> None:
    with silence():
        for layout in ("ddp", "fsdp1_flat", "zero 2", "zero 3"):
            run = Run(NET, layout)
            run.train(1)
            proof = dist_layerlr.verify(run.plan, run.model, run.optimizer, deep=True, steps=1)
            assert proof.optimizers == {"Muon": 24, "AdamW": 53}
            assert "53 by AdamW, 24 by Muon" in proof.line()
            assert set(proof.state_precision.values()) == {"float32"}


class Signs8bit(torch.optim.Optimizer):
    """State of one byte for tensors of 4,096 elements and more, as 8-bit packages keep it."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    dtype = torch.uint8 if param.numel() >= 4096 else torch.float32
                    self.state[param]["state1"] = (param.grad > 0).to(dtype)
                    param.sub_(param.grad.sign(), alpha=float(group["lr"]))


@cases
def test_the_precision_of_each_names_state_is_reported(at: At) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 3))
    plan = dist_layerlr.plan_model(model, {"learning_rate": 1e-3})
    optimizer = dist_layerlr.attach(plan, model, Signs8bit)
    model(torch.ones(4, 64)).square().sum().backward()
    optimizer.step()
    proof = dist_layerlr.verify(plan, model, optimizer)
    assert proof.state_precision["0.weight"] == "uint8"
    assert proof.state_precision["1.weight"] == "float32"
    assert "state in float32 (3), uint8 (1)" in proof.line()


@cases
def test_attach_says_once_what_sharding_makes_of_eight_bits(at: At) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            Run(NET, "fsdp2", Signs8bit, config={"learning_rate": LR})
    texts = [str(w.message) for w in told if "keeps small tensors in 32 bits" in str(w.message)]
    assert len(texts) == (at.rank == 0)


@cases
def test_a_gradient_that_one_rank_has_dropped_is_refused_on_every_rank(at: At) -> None:
    run = Run(NET, "ddp")
    run.backward(0)
    before = run.weights()
    if at.rank == 1:
        run.model.module.blocks[1].attn.proj.weight.grad = None
    with pytest.raises(PlanMismatch, match=r"blocks.1.attn.proj.weight: some of its elements have"):
        run.update()
    assert all(torch.equal(before[name], value) for name, value in run.weights().items())


@cases
def test_ranks_that_train_on_their_own_are_watched_on_their_own(at: At) -> None:
    model: Any = net()
    plan = dist_layerlr.plan_model(model, NET.config)
    optimizer = dist_layerlr.attach(plan, model, MAKES)
    NET.loss(model, at.rank, slice(None)).backward()
    if at.rank == 1:
        model.blocks[1].attn.proj.weight.grad = None
    with dist_layerlr.effect_check(plan, model, optimizer) as rates:
        optimizer.step()
    wanted = {name for name, entry in plan.entries.items() if entry.optimizer == "muon"}
    assert wanted - rates.keys() == ({"blocks.1.attn.proj.weight"} if at.rank else set())


class Decomposing(torch.optim.Adafactor):
    """Fails on what is not finite, as a decomposition does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    torch.linalg.svdvals(param.grad)
        super().step()


@cases
def test_a_matrix_that_fails_on_its_owner_fails_on_every_rank(at: At) -> None:
    run = Run(NET, "fsdp2", {**MAKES, "muon": Decomposing})
    run.backward(0)
    for name, param in run.model.named_parameters():
        if name.endswith("blocks.2.attn.proj.weight"):
            param.grad.to_local().fill_(float("nan"))
    with pytest.raises(RankFailure, match="LinAlgError"):
        run.update()


@cases
def test_an_optimizer_that_only_looks_at_whole_matrices_gets_them(at: At) -> None:
    """A user's own, which orthogonalises by itself: refused on slices, right on whole tensors."""
    makes = {**MAKES, "muon": optimizers.Plain}
    with silence():
        alone = Run(NET, "none", makes)
        alone.train(3)
        for layout in ("fsdp1_flat", "fsdp2", "zero 2", "ddp"):
            run = Run(NET, layout, makes)
            run.train(3)
            far = max(
                float((value - alone.weights()[name]).abs().max())
                for name, value in run.weights().items()
            )
            assert far < 1e-5, layout


@cases
def test_one_function_for_several_optimizers_is_refused(at: At) -> None:
    model = net()
    plan = dist_layerlr.plan_model(model, NET.config)
    with pytest.raises(dist_layerlr.ConfigError, match="Give a function for each"):
        dist_layerlr.attach(plan, model, adamw)
    with pytest.raises(dist_layerlr.ConfigError, match=r"names \['adamw', 'muon'\]"):
        dist_layerlr.attach(plan, model, {"muon": adamw})


@cases
def test_ranks_of_an_unwrapped_model_do_not_meet(at: At) -> None:
    """Each trains its own model on its own data, as if there were no other process."""
    mine, twin = (net() for _ in range(2))
    plan = dist_layerlr.plan_model(mine, NET.config)
    optimizer = dist_layerlr.attach(plan, mine, MAKES)
    parts = [n for n, e in plan.entries.items() if e.optimizer == "muon" and "mlp" in n]
    named = dict(twin.named_parameters())
    alone = torch.optim.Muon([named[name] for name in parts], lr=2 * TIMES * LR, weight_decay=DECAY)
    for model in (mine, twin):
        NET.loss(model, at.rank, slice(None)).backward()
    optimizer.step()
    alone.step()  # type: ignore[no-untyped-call]
    for name in parts:
        assert torch.equal(mine.get_parameter(name), named[name]), name
