"""Changes of a plan: pure, exact, and refused where they would change nothing."""

from __future__ import annotations

from typing import Any

import pytest

from dist_layerlr.checkpoint.resume import inherit
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import build_plan, read_changes, steered
from dist_layerlr.plan.entries import Plan
from dist_layerlr.report import explain
from tests.support.plans import config, lrs, toy

ATTENTION, NORM = "blocks.0.attn1.to_q.weight", "blocks.0.norm1.weight"


@pytest.fixture
def plan() -> Plan:
    return build_plan(toy(), config(depth_strategy="flat"))


def test_multiples_multiply_and_what_is_frozen_comes_back_with_all_of_them(plan: Plan) -> None:
    half = {"scale": [{"component": "self_attn", "by": 0.5}]}
    frozen = {"freeze": [{"match": "blocks.0"}]}
    thawed = {"thaw": [{"component": "self_attn"}]}
    quarter = steered(plan, half, frozen, half)
    assert (quarter.entries[ATTENTION].lr, quarter.entries[NORM].lr) == (0.0, 0.0)
    assert quarter.entries["blocks.1.attn1.to_q.weight"].lr == 4e-4 * 0.25
    back = steered(quarter, thawed)
    assert (back.entries[ATTENTION].lr, back.entries[NORM].lr) == (4e-4 * 0.25, 0.0)
    # One by one or together, and from the config's plan or from a changed one.
    assert back.digest == steered(plan, half, frozen, half, thawed).digest
    assert plan.entries[ATTENTION].lr == 4e-4 and plan.changes == ()


def test_a_reset_is_the_plan_of_the_config_again(plan: Plan) -> None:
    changed = steered(plan, {"scale": [{"match": "blocks.1", "by": 3.0}]})
    assert changed.digest != plan.digest
    assert steered(changed, {"reset": True}) == plan
    both = steered(changed, {"reset": True, "scale": [{"component": "ffn", "by": 2.0}]})
    assert both.digest == steered(plan, {"scale": [{"component": "ffn", "by": 2.0}]}).digest


def test_a_part_may_be_a_component_within_a_pattern(plan: Plan) -> None:
    part = {"component": "ffn", "match": "blocks.2", "by": 0.5}
    before, after = lrs(plan), lrs(steered(plan, {"scale": [part]}))
    assert [name for name in before if before[name] != after[name]] == ["blocks.2.ffn.net.2.weight"]


def test_the_changes_stand_in_plan_json_and_in_the_explanation(plan: Plan) -> None:
    raw = {"freeze": [{"match": "proj_out"}], "scale": [{"component": "ffn", "by": 0.5}]}
    changed = steered(plan, raw)
    assert changed.to_dict()["steered"] == [raw]
    assert "steered" not in plan.to_dict()
    text = explain(changed, "blocks.1.ffn.net.2.weight")
    assert "steered       x 0.5 of 0.0003" in text and "lr            0.00015" in text
    assert "steered" not in explain(changed, ATTENTION)


def test_rates_that_a_resume_takes_over_are_where_the_next_change_begins(plan: Plan) -> None:
    rows = steered(plan, {"scale": [{"component": "ffn", "by": 0.5}]}).to_dict()["parameters"]
    kept = config(depth_strategy="flat", resume_lr="checkpoint")
    taken, changes = inherit(rows, build_plan(toy(), kept))
    assert changes
    again = steered(taken, {"scale": [{"component": "ffn", "by": 0.5}]})
    assert again.entries["blocks.1.ffn.net.2.weight"].lr == 3e-4 * 0.25


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"scal": []}, "Unknown key 'scal' in steer. Did you mean 'scale'?"),
        ({"scale": [{"component": "ffn"}]}, "'by' is missing"),
        ({"scale": [{"component": "ffn", "by": 0}]}, "scale[0].by=0.0: must be a finite number >"),
        ({"scale": [{"by": 2.0}]}, "Invalid steer.scale[0]: it names no part of the model."),
        (
            {"freeze": [{"component": "fnn"}]},
            "freeze[0].component='fnn': must be one of cross_attn",
        ),
        ({"freeze": [{"match": "block.0"}]}, "freeze[0].match='block.0': it matches no parameter"),
        ({"freeze": [{"match": "re:("}]}, "Invalid steer.freeze[0]: Invalid match='re:('"),
        ({"thaw": [{"match": "blocks.0", "component": "default"}]}, "of component 'default'"),
        ({"reset": 1}, "Invalid steer.reset=1: must be true or false."),
    ],
)
def test_what_would_change_nothing_is_refused(plan: Plan, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        steered(plan, raw)
    assert said in str(caught.value)


def test_changes_are_read_back_as_they_were_written() -> None:
    raw = {
        "reset": True,
        "thaw": [{"match": "blocks.0"}],
        "scale": [{"component": "ffn", "match": "blocks.1", "by": 0.5}],
    }
    assert read_changes(raw).to_dict() == raw
