"""Silent failures that a ds_config brings: schedulers, clipping, round robin, rebuilt optimizers.

Numbers in the names are the rows of the table of 22 silent failures, as in
test_silent_deepspeed.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn

import dist_layerlr
from dist_layerlr.errors import ConfigError, PlanMismatch
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import need_cpu_adam, start_deepspeed
from tests.support.naive import (
    CONFIG,
    RATES,
    Weights,
    close,
    config,
    copy_of,
    make_model,
    movement,
    naive_groups,
    observed_rates,
    sgd,
)
from tests.support.naive_deepspeed import (
    ds_config,
    group_rates,
    masters,
    naive_engine,
    our_engine,
    run,
    silence,
    start,
    wrong,
)

cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return cases.run(request)


# --- 5: schedulers of the ds_config ---

FLATTENING = {
    "WarmupLR": {"warmup_max_lr": 1e-3, "warmup_num_steps": 2},
    "WarmupDecayLR": {"total_num_steps": 10, "warmup_num_steps": 2},
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3},
    "LRRangeTest": {"lr_range_test_min_lr": 1e-4},
}


@cases
def test_05_naive_scheduler_block_writes_one_rate_over_all_groups(at: At) -> None:
    for kind, params in FLATTENING.items():
        engine = naive_engine(1, scheduler={"type": kind, "params": params})
        run(engine, at, steps=4)
        assert len(set(group_rates(engine))) == 1, kind


@cases
def test_05_verify_names_the_rates_that_a_scheduler_block_overwrote(at: At) -> None:
    plan = dist_layerlr.plan_model(make_model(), CONFIG)
    for kind, params in FLATTENING.items():
        engine = naive_engine(1, scheduler={"type": kind, "params": params})
        run(engine, at, steps=4)
        with pytest.raises(PlanMismatch, match=r"planned lr"):
            dist_layerlr.verify(plan, engine, factor=group_rates(engine)[0] / RATES["self_attn"])


@cases
def test_05_scheduler_and_optimizer_blocks_are_refused_by_name(at: At) -> None:
    for kind, params in FLATTENING.items():
        with pytest.raises(ConfigError, match=kind):
            dist_layerlr.optim.check_ds_config(
                ds_config(1, scheduler={"type": kind, "params": params})
            )
    with pytest.raises(ConfigError, match="AdamW"):
        dist_layerlr.optim.check_ds_config(
            ds_config(1, optimizer={"type": "AdamW", "params": {"lr": 1e-3}})
        )


@cases
def test_05_warmup_cosine_keeps_ratios_and_is_let_through(at: At) -> None:
    settings = {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2}}
    plan, engine = our_engine(1, scheduler=settings)
    run(engine, at, steps=4)
    dist_layerlr.verify(
        plan,
        engine,
        factor=dist_layerlr.optim.read_back(engine)["head.weight"].lr / RATES["default"],
    )


def engine_in(emission: str, stage: int, scheduler: dict[str, Any]) -> Any:
    model = make_model()
    plan = dist_layerlr.plan_model(model, CONFIG)
    optimizer = dist_layerlr.attach(plan, model, sgd, emission=emission)
    engine = start(model, optimizer, ds_config(stage, scheduler=scheduler))
    if emission == "segmented":
        dist_layerlr.bind(plan, engine)
    return engine


@cases
def test_05_the_schedulers_of_live_engines_are_judged_by_what_they_do(at: At) -> None:
    """A warmup to one rate is wrong over groups, right as a ratio, wrong again above 1."""
    base = RATES["default"]
    warmup = {"warmup_min_lr": 0.0, "warmup_num_steps": 4}
    for stage in (1, 2, 3):
        for emission, top, right in (
            ("groups", base, False),
            ("segmented", base, True),
            ("segmented", 2.5 * base, False),
        ):
            params = {**warmup, "warmup_max_lr": top}
            engine = engine_in(emission, stage, {"type": "WarmupLR", "params": params})
            if right:
                dist_layerlr.optim.check_scheduler(engine.lr_scheduler)
            else:
                with pytest.raises(ConfigError, match=r"WarmupLR\(max_lrs=.*at step \d+ it"):
                    dist_layerlr.optim.check_scheduler(engine.lr_scheduler)
            run(engine, at, steps=6)
            live = dist_layerlr.optim.read_back(engine)
            factors = {
                live[f"{name}.weight"].lr / rate
                for name, rate in (
                    ("blocks.0.attn.to_q", RATES["self_attn"]),
                    ("head", RATES["default"]),
                )
            }
            one = max(factors) - min(factors) < 1e-9 and max(factors) <= 1.0 + 1e-9
            assert one == right, (stage, emission, factors)


# --- 9: the default of gradient_clipping ---


@cases
def test_09_naive_config_without_gradient_clipping_clips_at_one(at: At) -> None:
    def train_scaled(settings: dict[str, Any]) -> Weights:
        model = make_model()
        engine = start(model, sgd(naive_groups(model.named_parameters())), settings)
        run(engine, at, scale=1000.0)
        return movement(copy_of(make_model()), masters(engine))

    silent = ds_config(1)
    del silent["gradient_clipping"]
    clipped, free = train_scaled(silent), train_scaled(ds_config(1))
    assert max(free.values()) > 10 * max(clipped.values())


@cases
def test_09_a_config_that_does_not_say_gradient_clipping_is_refused(at: At) -> None:
    silent = ds_config(1)
    del silent["gradient_clipping"]
    with pytest.raises(ConfigError, match="gradient_clipping"):
        dist_layerlr.optim.check_ds_config(silent)


@cases
def test_09_clip_grad_norm_on_an_engine_says_where_clipping_is_set(at: At) -> None:
    _, engine = our_engine(1)
    with pytest.raises(ConfigError, match="gradient_clipping"):
        dist_layerlr.clip_grad_norm(engine, max_norm=1.0)


# --- 14: reads of single weights under round_robin_gradients ---


@cases
def test_14_naive_weights_read_under_round_robin_belong_to_other_names(at: At) -> None:
    engine = naive_engine(2, zero={"round_robin_gradients": True})
    assert len(wrong(copy_of(make_model()), masters(engine))) > 20
    assert wrong(copy_of(make_model()), masters(naive_engine(2))) == []


@cases
def test_14_round_robin_gradients_are_refused_by_name(at: At) -> None:
    with pytest.raises(ConfigError, match="round_robin_gradients"):
        dist_layerlr.optim.check_ds_config(ds_config(2, {"round_robin_gradients": True}))


# --- 19: Adagrad is rebuilt from its constructor's defaults ---


def one_group(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters()), "lr": 1e-3}]


def adagrad(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, lr=1.0)


@cases
def test_19_naive_adagrad_under_zero_trains_at_its_constructors_rate(at: At) -> None:
    for stage in (1, 2, 3):
        model = make_model()
        before = copy_of(model)
        optimizer = adagrad(one_group(model))
        engine = start(model, optimizer, ds_config(stage))
        # The user's optimizer, and any scheduler on it, are off the hook.
        assert optimizer.param_groups[0]["lr"] == 1e-3, stage
        assert engine.optimizer.optimizer is not optimizer, stage
        run(engine, at)
        # Adagrad's first update of an element is its learning rate, too.
        assert close(observed_rates(before, masters(engine)), dict.fromkeys(before, 1.0)), stage


@cases
def test_19_adagrad_under_zero_is_refused_with_the_reason(at: At) -> None:
    model = make_model()
    engine = start(model, adagrad(one_group(model)), ds_config(1))
    with pytest.raises(ConfigError, match="Adagrad"):
        dist_layerlr.optim.check_optimizer(engine.optimizer.optimizer, engine)
    plan = dist_layerlr.plan_model(make_model(), config(component_lr={}, default_lr=1e-3))
    with pytest.raises((ConfigError, PlanMismatch)):
        dist_layerlr.verify(plan, engine)


# --- 20: the optimizer that partial offload keeps on the device ---


@cases
def test_20_naive_twin_optimizer_of_partial_offload_never_hears_of_a_new_rate(at: At) -> None:
    need_cpu_adam()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    model = make_model()
    with silence():
        optimizer = DeepSpeedCPUAdam(
            naive_groups(model.named_parameters()), lr=1.0, weight_decay=0.0
        )
    zero = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    engine = start(model, optimizer, ds_config(3, zero))
    for group in engine.optimizer.param_groups:
        group["lr"] *= 0.5  # what any scheduler does
    main, twin = (
        engine.optimizer.optimizer.param_groups,
        engine.optimizer.backup_optimizer.param_groups,
    )
    assert [group["lr"] for group in main] == [0.5 * rate for rate in RATES.values()]
    # The first group is a copy, the others are the same dicts. Which half of the model the twin
    # steps follows from the name of the device; on a CPU both halves are called "cpu" and it steps
    # none.
    assert [group["lr"] for group in twin] == [
        RATES["self_attn"],
        0.5 * RATES["ffn"],
        0.5 * RATES["default"],
    ]


@cases
def test_20_naive_twin_optimizer_is_built_with_a_copy_of_the_first_rate(at: At) -> None:
    # The lines behind the test above, for machines without a compiled DeepSpeedCPUAdam.
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert "self.backup_optimizer = torch.optim.AdamW([backup_gpu_param],\n" in source
    assert 'lr=self.optimizer.param_groups[0]["lr"],' in source
    assert (
        source.count("backup_optimizer.param_groups[") == 2
    )  # only their 'params' are ever written


@cases
def test_20_partial_offload_is_refused_by_name(at: At) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        dist_layerlr.optim.check_ds_config(
            ds_config(3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}})
        )
    dist_layerlr.optim.check_ds_config(
        ds_config(3, {"offload_optimizer": {"device": "cpu", "ratio": 1.0}})
    )
