"""What docs/steering.md shows is what the reader of steer.json, the plan and the config take."""

from __future__ import annotations

import contextlib
import io
import json
import re

from dist_layerlr.plan import build_plan, load_config, steered
from launch.trainer.steering import read_orders
from tests.support.pages import blocks
from tests.support.ranks import run_ranks


def test_the_file_that_the_page_shows_is_one_that_is_read() -> None:
    (shown,) = blocks("docs/steering.md", "json")
    changes, orders = read_orders(json.loads(shown))
    names = {f"blocks.{i}.{part}.to_q.weight": (4, 4) for i in range(2) for part in ("attn1", "ff")}
    plan = build_plan(names, {"per_layer_lr": {"enabled": True, "depth_strategy": "flat"}})
    rates = {name: e.lr for name, e in steered(plan, changes).entries.items()}
    assert rates["blocks.0.attn1.to_q.weight"] == 4e-4 * 0.5 * 0.1
    assert (rates["blocks.1.ff.to_q.weight"], orders.save) == (0.0, True)


def test_the_advice_that_the_page_shows_is_taken_as_it_stands() -> None:
    advice = blocks("docs/steering.md", "text")[-1]
    config, steer = re.findall(r"^\{\n.*?^\}$", advice, re.MULTILINE | re.DOTALL)
    assert load_config(json.loads(config)).per_layer_lr.component_lr["self_attn"] == 7.5e-4
    changes, _ = read_orders(json.loads(steer))
    assert changes.scale[0].by == 0.25


def run_block(rank: int, world_size: int, code: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "steering.md", "exec"), {})
    return printed.getvalue()


def test_the_loop_of_the_page_runs() -> None:
    (code,) = blocks("docs/steering.md", "python")
    assert run_ranks(run_block, 1, code) == ["True 0.0\n"]
