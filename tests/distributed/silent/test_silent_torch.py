"""Silent failures of plain torch, DDP, FSDP1 and FSDP2: each shown on naive code, then with ours.

Numbers in the names are the rows of the table of 22 silent failures; `peers` are rules of other
projects. The first test of a row asserts that naive code still fails without an error: when it no
longer passes, upstream mended it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.naive import (
    CONFIG,
    RATES,
    Weights,
    adamw,
    backward,
    close,
    config,
    copy_of,
    farthest,
    make_model,
    movement,
    naive_groups,
    observed_rates,
    sgd,
    train,
    wanted_rates,
)
from tests.support.naive_torch import (
    WRAPS,
    fsdp1_flat,
    fsdp1_orig,
    fsdp2,
    trained,
    whole,
)

cases = Cases()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


# --- 1: the optimizer steps tensors that are no longer the model's ---


@cases
def test_01_naive_optimizer_built_before_fsdp1_flattens_trains_nothing(at: At) -> None:
    model = make_model()
    optimizer = adamw(naive_groups(model.named_parameters()))
    sharded = fsdp1_flat(model)
    before = whole(sharded)
    train(sharded, optimizer, at.rank, steps=2)
    assert set(movement(before, whole(sharded)).values()) == {0.0}


@cases
def test_01_naive_optimizer_built_before_fully_shard_trains_nothing(at: At) -> None:
    model = make_model()
    optimizer = adamw(naive_groups(model.named_parameters()))
    fsdp2(model)
    before = whole(model)
    train(model, optimizer, at.rank, steps=2)
    assert set(movement(before, whole(model)).values()) == {0.0}


@cases
def test_01_naive_load_with_assign_after_the_optimizer_trains_nothing(at: At) -> None:
    model = fsdp2(make_model())
    optimizer = adamw(naive_groups(model.named_parameters()))
    model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    )
    before = whole(model)
    train(model, optimizer, at.rank, steps=2)
    assert set(movement(before, whole(model)).values()) == {0.0}


@cases
def test_01_verify_names_what_an_optimizer_built_too_early_does_not_step(at: At) -> None:
    for wrap in (fsdp1_flat, fsdp2):
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        optimizer = adamw(naive_groups(model.named_parameters()))
        with pytest.raises(PlanMismatch, match=r"not stepped"):
            dist_layerlr.verify(plan, wrap(model), optimizer)


@cases
def test_01_verify_names_what_load_with_assign_took_out_of_the_optimizer(at: At) -> None:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    optimizer = dist_layerlr.attach(plan, fsdp2(model), adamw)
    dist_layerlr.verify(plan, model, optimizer)
    model.load_state_dict(
        {name: value.clone() for name, value in model.state_dict().items()}, assign=True
    )
    with pytest.raises(PlanMismatch, match=r"not stepped"):
        dist_layerlr.verify(plan, model, optimizer)


class Idle(torch.optim.SGD):
    """Reports rates, applies none."""

    def step(self, closure: Any = None) -> None: ...


@cases
def test_01_an_optimizer_that_moves_nothing_is_refused(at: At) -> None:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    with pytest.raises(ConfigError, match="Idle.*moved scratch weights by 0"):
        dist_layerlr.attach(plan, fsdp2(model), lambda groups: Idle(groups, lr=1.0))


@cases
def test_01_effect_check_sees_that_nothing_moved(at: At) -> None:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    optimizer = dist_layerlr.attach(plan, fsdp2(model), adamw)
    dist_layerlr.verify(plan, model, optimizer)
    backward(model, 0, at.rank)
    optimizer.step()
    with (
        pytest.raises(PlanMismatch, match=r"planned lr 0\.00"),
        dist_layerlr.effect_check(plan, model, optimizer),
    ):
        pass  # a step that is skipped, as by a wrapper


@cases
def test_01_attach_after_wrapping_trains_every_name_as_one_process_would(at: At) -> None:
    reference = trained(3)
    for label, wrap in WRAPS.items():
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        sharded = wrap(model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        dist_layerlr.verify(plan, sharded, optimizer)
        train(sharded, optimizer, at.rank, steps=3)
        assert farthest(whole(sharded), reference) < 5e-6, label
        dist_layerlr.verify(plan, sharded, optimizer)


# --- 2: FSDP1 with flat parameters collapses groups ---


@cases
def test_02_naive_grouping_on_fsdp1_flat_gives_every_name_the_default_rate(at: At) -> None:
    model = fsdp1_flat(make_model())
    groups = naive_groups(model.named_parameters())
    assert [(group["name"], len(group["params"])) for group in groups] == [("default", 4)]
    before = whole(model)
    train(model, adamw(groups), at.rank)
    assert close(observed_rates(before, whole(model)), dict.fromkeys(before, RATES["default"]))


@cases
def test_02_attach_on_fsdp1_flat_gives_each_name_its_own_rate(at: At) -> None:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    sharded = fsdp1_flat(model)
    optimizer = dist_layerlr.attach(plan, sharded, adamw)
    assert {
        n: p.lr for n, p in dist_layerlr.optim.read_back(sharded, optimizer).items()
    } == wanted_rates()
    before = whole(sharded)
    backward(sharded, 0, at.rank)
    with dist_layerlr.effect_check(plan, sharded, optimizer) as observed:
        optimizer.step()
    assert observed
    assert close(observed_rates(before, whole(sharded)), wanted_rates())


@cases
def test_02_verify_refuses_a_naive_optimizer_on_fsdp1_flat(at: At) -> None:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    sharded = fsdp1_flat(model)
    with pytest.raises(PlanMismatch, match=r"blocks\.0\.attn\.to_q"):
        dist_layerlr.verify(plan, sharded, adamw(naive_groups(sharded.named_parameters())))


# --- 9: clipping by this rank's shards only ---


def true_norm() -> float:
    model = make_model()
    backward(model, 0)
    return float(nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None))


def clipped_sgd(max_norm: float) -> Weights:
    model = make_model()
    backward(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    sgd(naive_groups(model.named_parameters())).step()
    return copy_of(model)


@cases
def test_09_naive_torch_clipping_on_fsdp1_uses_another_norm_on_each_rank(at: At) -> None:
    model = fsdp1_orig(make_model())
    backward(model, 0, at.rank)
    mine = float(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
    norms = [0.0, 0.0]
    dist.all_gather_object(norms, mine)
    assert norms[0] != pytest.approx(norms[1], rel=1e-3)
    assert all(norm < 0.999 * true_norm() for norm in norms)


@cases
def test_09_clip_grad_norm_clips_by_the_norm_of_the_whole_model_under_every_sharder(at: At) -> None:
    reference = clipped_sgd(0.05)
    for label, wrap in WRAPS.items():
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        sharded = wrap(model)
        optimizer = dist_layerlr.attach(plan, sharded, sgd)
        backward(sharded, 0, at.rank)
        norm = dist_layerlr.clip_grad_norm(sharded, 0.05)
        assert float(norm) == pytest.approx(true_norm(), rel=1e-5), label
        optimizer.step()
        assert farthest(whole(sharded), reference) < 1e-7, label


# --- 10: rules that look at shapes after wrapping ---


@cases
def test_10_naive_ndim_rule_after_fsdp1_takes_weight_decay_from_every_parameter(at: At) -> None:
    model = fsdp1_orig(make_model())
    params = list(model.parameters())
    assert [p for p in params if p.ndim >= 2] == []
    empty = [p for p in params if p.numel() == 0]
    assert empty, "no parameter is empty on this rank"


@cases
def test_10_weight_decay_by_true_shape_survives_every_sharder(at: At) -> None:
    wanted = {name: 0.1 if p.ndim >= 2 else 0.0 for name, p in make_model().named_parameters()}
    for label, wrap in WRAPS.items():
        model = make_model()
        plan = dist_layerlr.plan_model(model, config(weight_decay=0.1, no_decay=["ndim<=1"]))
        sharded = wrap(model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        live = dist_layerlr.optim.read_back(sharded, optimizer)
        assert {name: p.weight_decay for name, p in live.items()} == wanted, label


@cases
def test_10_a_plan_of_a_model_that_fsdp1_has_flattened_is_refused(at: At) -> None:
    for wrap in (fsdp1_orig, fsdp1_flat):
        with pytest.raises(PlanMismatch, match="before wrapping"):
            dist_layerlr.plan_model(wrap(make_model()), CONFIG)
    plain = dist_layerlr.plan_model(make_model(), CONFIG)
    assert dist_layerlr.plan_model(fsdp2(make_model()), CONFIG).digest == plain.digest


# --- 11: wrapper prefixes in names ---


@cases
def test_11_naive_rule_from_the_start_of_a_name_matches_nothing_once_wrapped(at: At) -> None:
    for wrap in (DDP, fsdp1_orig):
        names = [name for name, _ in wrap(make_model()).named_parameters()]
        assert [name for name in names if name.startswith("blocks.0.")] == []


@cases
def test_11_names_read_back_are_those_of_the_unwrapped_model(at: At) -> None:
    for label, wrap in WRAPS.items():
        model = make_model()
        plan = dist_layerlr.plan_model(
            model, config(patterns=[{"match": "blocks.0.mlp.*", "component": "self_attn"}])
        )
        sharded = wrap(model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        live = dist_layerlr.optim.read_back(sharded, optimizer)
        assert list(live.keys() ^ wanted_rates().keys()) == [], label
        assert live["blocks.0.mlp.0.weight"].lr == RATES["self_attn"], label
