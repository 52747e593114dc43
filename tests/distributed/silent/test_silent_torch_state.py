"""Silent failures of resumes, of optimizers and of other projects' rules on torch's own sharders.

Numbers in the names are the rows of the table of 22 silent failures, as in test_silent_torch.py;
`peers` are rules of other projects.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.naive import (
    CONFIG,
    RATES,
    adamw,
    config,
    farthest,
    make_model,
    movement,
    naive_groups,
    train,
)
from tests.support.naive_torch import (
    WRAPS,
    fsdp1_flat,
    fsdp1_orig,
    fsdp2,
    steps_taken,
    trained,
    whole,
)

cases = Cases()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


# --- 6: resume brings the old plan's rates back ---


def another_plan_is_resumed(at: At) -> tuple[Any, Any, Any]:
    """Train one step by CONFIG, then load its state into an optimizer of a plan with ten times the
    rates."""
    model = make_model()
    old = dist_layerlr.plan_model(model, CONFIG)
    tenfold = {key: 10 * rate for key, rate in RATES.items()}
    default = tenfold.pop("default")
    new = dist_layerlr.plan_model(model, config(component_lr=tenfold, default_lr=default))
    fsdp2(model)
    first = adamw(dist_layerlr.optim.param_groups(old, model))
    train(model, first, at.rank)
    saved = get_optimizer_state_dict(model, first)
    second = adamw(dist_layerlr.optim.param_groups(new, model))
    set_optimizer_state_dict(model, second, saved)
    return model, new, second


@cases
def test_06_naive_resume_through_torch_checkpoints_keeps_the_old_rates_of_a_new_plan(
    at: At,
) -> None:
    _, _, optimizer = another_plan_is_resumed(at)
    assert {group["lr"] for group in optimizer.param_groups} == set(RATES.values())
    assert {group["initial_lr"] for group in optimizer.param_groups} == set(RATES.values())


@cases
def test_06_reapply_puts_the_new_plan_back_after_a_resume(at: At) -> None:
    model, new, optimizer = another_plan_is_resumed(at)
    with pytest.raises(PlanMismatch, match="lr"):
        dist_layerlr.verify(new, model, optimizer)
    dist_layerlr.proof.reapply(new, model, optimizer)
    dist_layerlr.verify(new, model, optimizer)
    before = whole(model)
    assert steps_taken(optimizer) == {1}
    train(model, optimizer, at.rank)
    assert max(movement(before, whole(model)).values()) > 5 * RATES["self_attn"]


# --- 12: empty groups ---


@cases
def test_12_naive_empty_group_loses_its_settings_in_a_torch_checkpoint(at: At) -> None:
    model = fsdp2(make_model())
    groups = [
        {"params": [], "lr": 9e-3, "name": "nothing"},
        *naive_groups(model.named_parameters()),
    ]
    optimizer = adamw(groups)
    train(model, optimizer, at.rank)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    with pytest.raises(KeyError, match="betas"):
        train(model, optimizer, at.rank)


@cases
def test_12_attach_leaves_frozen_parameters_and_empty_groups_out(at: At) -> None:
    for label in ("ddp", "fsdp1 orig", "fsdp2"):
        model = make_model()
        for name, param in model.named_parameters():
            param.requires_grad_(".mlp." not in name)
        plan = dist_layerlr.plan_model(model, CONFIG)
        sharded = WRAPS[label](model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        assert all(group["params"] for group in optimizer.param_groups), label
        before = whole(sharded)
        train(sharded, optimizer, at.rank)
        set_optimizer_state_dict(sharded, optimizer, get_optimizer_state_dict(sharded, optimizer))
        train(sharded, optimizer, at.rank)
        dist_layerlr.verify(plan, sharded, optimizer)
        moved = movement(before, whole(sharded))
        assert {name for name, much in moved.items() if much == 0.0} == {
            n for n in moved if ".mlp." in n
        }, label


# --- 13: a checkpoint before the first step steps ---


@cases
def test_13_naive_optimizer_state_dict_before_training_runs_a_step(at: At) -> None:
    model = fsdp2(make_model())
    optimizer = adamw(naive_groups(model.named_parameters()))
    get_optimizer_state_dict(model, optimizer)
    assert steps_taken(optimizer) == {1}
    train(model, optimizer, at.rank, steps=2)
    assert farthest(whole(model), trained(2)) > 1e-4


@cases
def test_13_nothing_of_ours_steps_before_training(at: At) -> None:
    for label, wrap in WRAPS.items():
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        sharded = wrap(model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        dist_layerlr.verify(plan, sharded, optimizer)
        dist_layerlr.optim.read_back(sharded, optimizer)
        dist_layerlr.proof.check_manifest(
            dist_layerlr.proof.manifest(plan, sharded, optimizer), plan, sharded, optimizer
        )
        dist_layerlr.proof.reapply(plan, sharded, optimizer)
        dist_layerlr.save_checkpoint(at.folder / label, plan, sharded, optimizer, step=0)
        dist_layerlr.load_checkpoint(at.folder / label, plan, sharded, optimizer)
        assert steps_taken(optimizer) <= {0}, label
        train(sharded, optimizer, at.rank, steps=2)
        assert steps_taken(optimizer) == {2}, label
        assert farthest(whole(sharded), trained(2)) < 5e-6, label


# --- 18: optimizers whose update of one element depends on others ---


@cases
def test_18_naive_adafactor_on_fsdp1_shards_computes_other_updates(at: At) -> None:
    def adafactor(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups, lr=1.0)

    model = fsdp1_orig(make_model())
    train(model, adafactor(naive_groups(model.named_parameters())), at.rank, steps=5)
    assert farthest(whole(model), trained(5, adafactor)) > 1e-4


@cases
def test_18_adafactor_on_shards_is_refused_with_the_reason(at: At) -> None:
    for wrap in (fsdp1_orig, fsdp1_flat, fsdp2):
        model = wrap(make_model())
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
        with pytest.raises(ConfigError, match="Adafactor.* matrices"):
            dist_layerlr.optim.check_optimizer(optimizer, model)
        dist_layerlr.optim.check_optimizer(adamw(model.parameters()), model)
    model = DDP(make_model())
    dist_layerlr.optim.check_optimizer(torch.optim.Adafactor(model.parameters(), lr=1e-3), model)


@cases
def test_18_attach_itself_refuses_adafactor_on_shards(at: At) -> None:
    for wrap in (fsdp1_orig, fsdp1_flat, fsdp2):
        model = make_model()
        plan = dist_layerlr.plan_model(model, CONFIG)
        with pytest.raises(ConfigError, match="Adafactor"):
            dist_layerlr.attach(
                plan, wrap(model), lambda groups: torch.optim.Adafactor(groups, lr=1.0)
            )


# --- 22: ranks with different plans ---


@cases
def test_22_naive_ranks_with_different_rates_train_on_without_an_error(at: At) -> None:
    model = DDP(make_model())
    before = whole(model)
    groups = naive_groups(model.named_parameters())
    for group in groups:
        group["lr"] *= 1 + at.rank  # a config file that differs on one machine
    train(model, adamw(groups), at.rank, steps=2)
    mine = whole(model)
    other = {name: value.clone() for name, value in mine.items()}
    for value in other.values():
        dist.broadcast(value, src=0)
    apart = farthest(mine, other)
    assert at.rank == 0 or apart > 0.5 * max(movement(before, other).values())


@cases
def test_22_verify_stops_every_rank_when_their_plans_differ(at: At) -> None:
    for wrap in WRAPS.values():
        model = make_model()
        plan = dist_layerlr.plan_model(model, config(default_lr=RATES["default"] * (1 + at.rank)))
        sharded = wrap(model)
        with pytest.raises(PlanMismatch, match="differ between ranks"):
            # Whichever of the two looks first.
            dist_layerlr.verify(plan, sharded, dist_layerlr.attach(plan, sharded, adamw))


# --- rules of other projects ---


def timm_groups(named: Any, decay: float = 0.75) -> list[dict[str, Any]]:
    """timm's `param_groups_layer_decay`, from its description: unmatched names belong to the last
    layer."""
    rows = []
    for name, param in named:
        block = re.match(r"^blocks\.(\d+)", name)
        layer = 0 if name.startswith("emb.") else 1 + int(block[1]) if block else None
        rows.append((param, layer, 0.0 if param.ndim <= 1 or name.endswith(".bias") else 0.05))
    last = max((layer for _, layer, _ in rows if layer is not None), default=0) + 1
    return [
        {
            "params": [param],
            "lr": decay ** (last - (last if layer is None else layer)),
            "weight_decay": weight_decay,
        }
        for param, layer, weight_decay in rows
    ]


@cases
def test_peers_naive_timm_rule_after_fsdp1_gives_one_rate_and_no_weight_decay(at: At) -> None:
    plain = timm_groups(make_model().named_parameters())
    assert (len({g["lr"] for g in plain}), len({g["weight_decay"] for g in plain})) == (5, 2)
    for wrap in (fsdp1_orig, fsdp1_flat):
        wrapped = timm_groups(wrap(make_model()).named_parameters())
        assert ({g["lr"] for g in wrapped}, {g["weight_decay"] for g in wrapped}) == ({1.0}, {0.0})


@cases
def test_peers_layer_decay_in_timms_convention_survives_every_sharder(at: At) -> None:
    wanted = {}
    for (name, _), group in zip(
        make_model().named_parameters(), timm_groups(make_model().named_parameters()), strict=True
    ):
        wanted[name] = (pytest.approx(group["lr"]), group["weight_decay"])
    rule = config(
        component_lr={},
        default_lr=1.0,
        depth_strategy="layer_decay",
        layer_decay=0.75,
        convention="timm",
        weight_decay=0.05,
        no_decay=["ndim<=1"],
    )
    for label, wrap in WRAPS.items():
        model = make_model()
        plan = dist_layerlr.plan_model(model, rule)
        sharded = wrap(model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        dist_layerlr.verify(plan, sharded, optimizer)
        live = dist_layerlr.optim.read_back(sharded, optimizer)
        # `emb` is a stem in the rule above; ours knows a stem by the names of real models.
        found = {
            name: (p.lr, p.weight_decay) for name, p in live.items() if not name.startswith("emb.")
        }
        assert found == {
            name: pair for name, pair in wanted.items() if not name.startswith("emb.")
        }, label


def lora_model() -> Any:
    return get_peft_model(make_model(), LoraConfig(r=4, target_modules=["to_q", "to_k", "to_out"]))


def rates_of(optimizer: torch.optim.Optimizer, model: nn.Module, part: str) -> set[float]:
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {rates[id(p)] for name, p in model.named_parameters() if part in name}


@cases
def test_peers_naive_loraplus_on_fsdp1_trains_lora_a_at_the_rate_of_lora_b(at: At) -> None:
    plain = lora_model()
    optimizer = create_loraplus_optimizer(plain, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    assert (rates_of(optimizer, plain, "lora_A"), rates_of(optimizer, plain, "lora_B")) == (
        {1e-4},
        {16e-4},
    )
    sharded = fsdp1_orig(lora_model())
    optimizer = create_loraplus_optimizer(sharded, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    assert (rates_of(optimizer, sharded, "lora_A"), rates_of(optimizer, sharded, "lora_B")) == (
        {16e-4},
        {16e-4},
    )


@cases
def test_peers_our_loraplus_ratio_survives_every_sharder(at: At) -> None:
    # Flat parameters cannot mix frozen and trainable ones, so FSDP1 needs its original parameters
    # here.
    for label in ("ddp", "fsdp1 orig", "fsdp2"):
        model = lora_model()
        plan = dist_layerlr.plan_model(model, config(lora_plus_ratio=16))
        blocks = model.base_model.model
        if label == "fsdp2":
            fsdp2(blocks)
        sharded = model if label == "fsdp2" else WRAPS[label](model)
        optimizer = dist_layerlr.attach(plan, sharded, adamw)
        dist_layerlr.verify(plan, sharded, optimizer)
        live = dist_layerlr.optim.read_back(sharded, optimizer)
        assert {p.lr for n, p in live.items() if "lora_A" in n} == {RATES["self_attn"]}, label
        assert {p.lr for n, p in live.items() if "lora_B" in n} == {16 * RATES["self_attn"]}, label
        assert len(live) == 2 * 3 * len(model.base_model.model.blocks), label
