"""Silent failures of plain torch, DDP, FSDP1 and FSDP2: each shown on naive code, then with ours.

Numbers in the names are the rows of the table of 22 silent failures; `peers` are rules of other
projects. The first test of a row asserts that naive code still fails without an error: when it no
longer passes, upstream mended it.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from toy import (
    CONFIG,
    RATES,
    At,
    Block,
    Cases,
    Outcomes,
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

cases = Cases()


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


def fsdp1(model: nn.Module, *, flat: bool) -> FSDP:
    policy = ModuleWrapPolicy({Block})
    return FSDP(
        model, use_orig_params=not flat, auto_wrap_policy=policy, device_id=torch.device("cpu")
    )


def fsdp1_flat(model: nn.Module) -> FSDP:
    return fsdp1(model, flat=True)


def fsdp1_orig(model: nn.Module) -> FSDP:
    return fsdp1(model, flat=False)


def fsdp2(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {"ddp": DDP, "fsdp1 orig": fsdp1_orig, "fsdp1 flat": fsdp1_flat, "fsdp2": fsdp2}


def whole(model: nn.Module) -> Weights:
    """Full weights under plain names, whatever wraps the model."""
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model, writeback=False):
            named = [
                (n.replace("_fsdp_wrapped_module.", ""), p.detach().clone())
                for n, p in model.named_parameters()
            ]
            return dict(named)
    inner = model.module if isinstance(model, DDP) else model
    return {
        name: (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()
        for name, param in inner.named_parameters()
    }


def trained(steps: int, make: Any = adamw, groups: Any = None) -> Weights:
    """Weights of one unsharded process after some steps on the global batch."""
    model = make_model()
    train(model, make(groups or naive_groups(model.named_parameters())), steps=steps)
    return copy_of(model)


def steps_taken(optimizer: torch.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values() if "step" in state}


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


@cases
def test_01_effect_check_sees_that_nothing_moved(at: At) -> None:
    class Idle(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            """Report rates, apply none."""

    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    optimizer = dist_layerlr.attach(plan, fsdp2(model), lambda groups: Idle(groups, lr=1.0))
    dist_layerlr.verify(plan, model, optimizer)
    backward(model, 0, at.rank)
    with (
        pytest.raises(PlanMismatch, match=r"planned lr 0\.00"),
        dist_layerlr.effect_check(plan, model, optimizer),
    ):
        optimizer.step()


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
        with pytest.raises(ConfigError, match="Adafactor.*whole matrices"):
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
