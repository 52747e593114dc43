"""When names train: windows, ramps, own schedules, gradual unfreezing, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_layerlr import (
    ConfigError,
    Plan,
    PlanMismatch,
    PlanSchedule,
    Schedule,
    attach,
    build_plan,
    plan_model,
    verify,
)
from dist_layerlr.optim import check_scheduler
from dist_layerlr.report.grid import explain, grid
from tests.support.toys import Transformer

NAMES = {
    **{f"blocks.{i}.{m}.weight": (4, 4) for i in range(4) for m in ("attn.to_q", "ff.net")},
    "patch_embed.weight": (4, 4),
    "head.weight": (4, 4),
}


def planned(*rules: dict[str, Any], **more: Any) -> Plan:
    block = {"enabled": True, "timing": list(rules), "unmatched": "default", **more}
    return build_plan(NAMES, {"per_layer_lr": block})


def starts(plan: Plan) -> dict[str, int]:
    return {n: e.timing.start if e.timing else 0 for n, e in plan.entries.items()}


def test_the_last_block_trains_first_and_embeddings_after_the_first_block() -> None:
    found = starts(planned({"from": 10, "unfreeze": {"every": 100}}))
    assert [found[f"blocks.{i}.ff.net.weight"] for i in range(4)] == [310, 210, 110, 10]
    assert (found["head.weight"], found["patch_embed.weight"]) == (10, 410)
    found = starts(planned({"unfreeze": {"every": 100, "start": "first"}}))
    assert [found[f"blocks.{i}.ff.net.weight"] for i in range(4)] == [0, 100, 200, 300]
    assert (found["head.weight"], found["patch_embed.weight"]) == (0, 0)


def test_the_first_rule_that_hits_wins_and_a_region_comes_last() -> None:
    plan = planned(
        {"components": ["ffn"], "depth": [0.5, 1.0], "from": 7},
        {"match": "blocks.2", "from": 5},
        regions=[{"match": "blocks", "from": 3}],
    )
    found = starts(plan)
    assert [found[f"blocks.{i}.ff.net.weight"] for i in range(4)] == [3, 3, 7, 7]
    assert [found[f"blocks.{i}.attn.to_q.weight"] for i in range(4)] == [3, 3, 5, 3]
    assert found["head.weight"] == 0


def test_an_own_schedule_takes_the_place_of_the_runs_and_a_ramp_multiplies_it() -> None:
    own = {"type": "linear", "min_ratio": 0.5}
    rules = (
        {"components": ["ffn"], "from": 10, "until": 15, "schedule": own},
        {"components": ["self_attn"], "from": 10, "ramp": 4},
    )
    plan = planned(*rules, depth_strategy="flat")
    ffn = plan.entries["blocks.0.ff.net.weight"]
    rates = [ffn.lr_at(step, 0.1) / ffn.lr for step in range(9, 16)]
    assert rates == pytest.approx([0, 1, 0.875, 0.75, 0.625, 0.5, 0])
    attn = plan.entries["blocks.0.attn.to_q.weight"]
    rates = [attn.lr_at(step, 0.1) / attn.lr for step in range(9, 15)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert plan.at_step(12).entries[ffn.name].lr == pytest.approx(0.75 * ffn.lr)
    assert "from step 10 to 14, own schedule linear to 0.5 in 5 steps" in explain(plan, ffn.name)


def test_timings_part_groups_and_digests_and_a_rule_without_any_changes_nothing() -> None:
    plain, timed = planned(), planned({"components": ["ffn"], "from": 10})
    assert planned({"components": ["ffn"]}).digest == plain.digest != timed.digest
    assert "(from step 10 on)" in grid(timed)
    assert "from step" not in grid(plain)
    assert {spec.timing for spec in planned({"match": "head", "from": 1}).groups} >= {None}


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"from": 5, "until": 3}, r"timing\[0\].until=3: must be above 'from' \(5\)"),
        ({"until": 150, "unfreeze": {"every": 100}}, r"timing\[0\].until=150: must be above 300"),
        ({"until": 10, "ramp": 11}, r"timing\[0\].ramp=11: must be at most 10"),
        ({"schedule": {"type": "cosine"}}, r"schedule='cosine': it has no end. Give 'steps'"),
        ({"schedule": {"type": "cos"}}, r"timing\[0\].schedule.type='cos'"),
        ({"unfreeze": {"by": "name"}}, r"timing\[0\].unfreeze.by='name'"),
        ({"unfreze": {}}, r"Unknown key 'unfreze' in per_layer_lr.timing\[0\]. Did you mean"),
        ({"depth": [1, 0]}, r"timing\[0\].depth=\[1, 0\]: must be two numbers"),
        ({"match": "nothing"}, r"timing\[0\].match='nothing': it matches no parameter"),
        ({"components": ["cross_attn"]}, r"timing\[0\]: no parameter has its components"),
    ],
)
def test_a_timing_that_cannot_be_is_one_line_that_names_its_field(
    rule: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as error:
        planned(rule)
    assert "\n" not in str(error.value)


def live(emission: str = "groups", **settings: Any) -> tuple[Plan, Any, Any]:
    model = Transformer()
    rule = {"components": ["ffn"], "from": 3}
    plan = plan_model(
        model, {"per_layer_lr": {"enabled": True, "timing": [rule], "unmatched": "default"}}
    )
    make = lambda groups: torch.optim.SGD(groups, **{"momentum": 0.9, **settings})  # noqa: E731
    return plan, model, attach(plan, model, make, emission=emission)


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_nothing_is_stepped_before_a_schedule_says_which_step_it_is(emission: str) -> None:
    plan, model, optimizer = live(emission)
    model(torch.ones(2, 7)).sum().backward()
    with pytest.raises(ConfigError, match="nobody has told the optimizer which step"):
        optimizer.step()
    schedule = PlanSchedule(optimizer, Schedule())
    optimizer.step()
    assert verify(plan, model, optimizer).step == 0
    schedule.step()
    with pytest.raises(PlanMismatch, match="at step 1, not 0"):
        verify(plan, model, optimizer, step=0)


def test_a_held_names_gradient_counts_in_no_norm_and_others_schedulers_are_refused() -> None:
    plan, model, optimizer = live()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    with pytest.raises(ConfigError, match="the plan has timings"):
        check_scheduler(scheduler)
    schedule = PlanSchedule(optimizer, Schedule())
    check_scheduler(schedule)
    for step in range(4):
        model.zero_grad()
        model(torch.ones(2, 7)).sum().backward()
        held = [p.grad for n, p in model.named_parameters() if ".ffn." in n]
        assert all(bool((g == 0).all()) for g in held) == (step < 3)
        optimizer.step()
        schedule.step()


def test_what_cannot_keep_a_timing_refuses_it() -> None:
    with pytest.raises(ConfigError, match="dampening=0.1"):
        live(dampening=0.1)
    with pytest.raises(ConfigError, match="cannot say when a name trains"):
        planned({"components": ["ffn"], "from": 3}).to_param_groups()
    with pytest.raises(ConfigError, match="timing beside 'optimizers'"):
        build_plan(
            NAMES,
            {
                "optimizers": {"muon": {}, "adamw": "rest"},
                "per_layer_lr": {"enabled": True, "timing": [{"from": 3}]},
            },
        )
