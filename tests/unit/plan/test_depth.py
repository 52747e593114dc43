"""Depth factors against the formulas of the specification, written again here."""

from __future__ import annotations

import math
from itertools import product

import pytest

from dist_layerlr import build_plan, register_depth
from dist_layerlr.plan.depth import DEPTH_FUNCTIONS, DepthSettings, depth_factor
from tests.support import census

EXACT = 1e-12


def settings(strategy: str, **options) -> DepthSettings:
    return DepthSettings(depth_strategy=strategy, **options)


def reference(strategy: str, idx: int, n: int, m: float, p: float = 0.5) -> float:
    """The formulas as the specification states them."""
    if n == 1:
        return 1.0
    x = idx / (n - 1)
    if strategy == "linear":
        return 1 - x * (1 - m)
    if strategy == "cosine":
        return m + (1 - m) * 0.5 * (1 + math.cos(math.pi * x))
    if strategy == "inverted_u":
        d = 0.0 if x == p else (p - x) / p if x < p else (x - p) / (1 - p)
        return m + (1 - m) * (1 - d * d)
    return 1.0


# N = 20, m = 0.3, blocks 0, 5, 10, 15, 19: worked out by hand from x = idx/19. The cosines are
# those of k*pi/19.
COS_5, COS_10, COS_15 = 0.6772815716257410, -0.0825793454723323, -0.7891405093963936
HAND = {
    "linear": [1.0, 1 - 3.5 / 19, 1 - 7 / 19, 1 - 10.5 / 19, 0.3],
    "cosine": [1.0, 0.65 + 0.35 * COS_5, 0.65 + 0.35 * COS_10, 0.65 + 0.35 * COS_15, 0.3],
    "inverted_u": [0.3, 0.3 + 0.7 * 280 / 361, 0.3 + 0.7 * 360 / 361, 0.3 + 0.7 * 240 / 361, 0.3],
    "flat": [1.0] * 5,
}
PEERS = {  # three digits, evaluated by somebody else
    "linear": [1, 0.816, 0.632, 0.447, 0.3],
    "cosine": [1, 0.887, 0.621, 0.374, 0.3],
}


@pytest.mark.parametrize("strategy", HAND)
def test_twenty_blocks_have_the_factors_worked_out_by_hand(strategy: str):
    got = [depth_factor(i, 20, settings(strategy)) for i in (0, 5, 10, 15, 19)]
    assert got == pytest.approx(HAND[strategy], abs=EXACT)
    assert got == pytest.approx(PEERS.get(strategy, got), abs=5e-4)


@pytest.mark.parametrize("strategy", ["linear", "cosine", "inverted_u", "flat"])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 20, 48])
def test_curves_equal_their_formulas_and_stay_within_bounds(strategy: str, n: int):
    for m, p in product((0.0, 0.15, 0.3, 0.7, 1.0), (0.0, 0.25, 0.4, 0.5, 1.0)):
        chosen = settings(strategy, min_depth_factor=m, peak_position=p)
        got = [depth_factor(i, n, chosen) for i in range(n)]
        assert got == pytest.approx([reference(strategy, i, n, m, p) for i in range(n)], abs=EXACT)
        assert all(m <= factor <= 1.0 for factor in got)


@pytest.mark.parametrize("strategy", [*DEPTH_FUNCTIONS])
def test_a_single_block_is_not_slowed(strategy: str):
    assert depth_factor(0, 1, settings(strategy, depth_table=(0.2, 0.4))) == 1.0


@pytest.mark.parametrize("strategy", ["linear", "cosine"])
def test_linear_and_cosine_fall_from_one_to_the_minimum(strategy: str):
    got = [depth_factor(i, 30, settings(strategy, min_depth_factor=0.2)) for i in range(30)]
    assert got[0] == 1.0 and got[-1] == pytest.approx(0.2, abs=EXACT) and got[-1] >= 0.2
    assert all(a > b for a, b in zip(got, got[1:], strict=False))


@pytest.mark.parametrize("peak", [0.25, 0.5, 0.75])
def test_inverted_u_rises_to_its_peak_and_falls_with_the_minimum_at_both_ends(peak: float):
    got = [depth_factor(i, 21, settings("inverted_u", peak_position=peak)) for i in range(21)]
    top = round(peak * 20)
    assert got[top] == 1.0 and got[0] == got[-1] == pytest.approx(0.3, abs=EXACT)
    assert all(a < b for a, b in zip(got[:top], got[1 : top + 1], strict=True))
    assert all(a > b for a, b in zip(got[top:-1], got[top + 1 :], strict=True))


@pytest.mark.parametrize(("peak", "first", "last"), [(0.0, 1.0, 0.3), (1.0, 0.3, 1.0)])
def test_a_peak_at_an_end_makes_that_end_one(peak: float, first: float, last: float):
    chosen = settings("inverted_u", peak_position=peak)
    assert [depth_factor(i, 7, chosen) for i in (0, 6)] == pytest.approx([first, last], abs=EXACT)


def test_a_table_of_the_right_length_is_used_as_it_is():
    factors = (0.1, 0.9, 0.4, 2.0)
    assert (
        tuple(depth_factor(i, 4, settings("table", depth_table=factors)) for i in range(4))
        == factors
    )


def test_a_table_of_another_length_is_interpolated():
    chosen = settings("table", depth_table=(1.0, 0.5, 0.0))
    assert [depth_factor(i, 5, chosen) for i in range(5)] == pytest.approx(
        [1, 0.75, 0.5, 0.25, 0], abs=EXACT
    )
    assert [depth_factor(i, 2, chosen) for i in range(2)] == [1.0, 0.0]


def flux(block: dict) -> dict:
    rates = {"self_attn": 1.0, "cross_attn": 1.0, "ffn": 1.0, "norm": 1.0}
    config = {"per_layer_lr": {"enabled": True, "component_lr": rates, "default_lr": 1.0, **block}}
    return build_plan(census.shapes("flux1_dev"), config).entries


@pytest.mark.parametrize(("scope", "column"), [("stack", "block"), ("trunk", "trunk")])
def test_depth_scope_restarts_per_stack_or_runs_over_the_trunk(scope: str, column: str):
    entries = flux({"depth_scope": scope, "min_depth_factor": 0.2})
    for row in census.table("flux1_dev"):
        expected = 1.0
        if row["stack"] != "-":
            index, count = int(row[f"{column}_idx"]), int(row[f"{column}_count"])
            assert count == (57 if scope == "trunk" else {"t": 19, "s": 38}[row["stack"][0]])
            expected = reference("linear", index, count, 0.2)
        assert entries[row["name"]].factor == pytest.approx(expected, abs=EXACT), row["name"]


def test_a_custom_curve_is_one_line():
    register_depth("step", lambda x, s: 1.0 if x < 0.5 else s.floor)
    try:
        entries = flux({"depth_strategy": "step", "min_depth_factor": 0.25})
        for e in entries.values():
            deep = e.block is not None and e.block / (e.blocks - 1) >= 0.5
            assert e.factor == (0.25 if deep else 1.0)
        with pytest.raises(ValueError, match="'step': it is taken"):
            register_depth("step", lambda x, s: 1.0)
    finally:
        del DEPTH_FUNCTIONS["step"]


def test_a_built_in_curve_cannot_be_replaced_by_accident():
    for name in ("linear", "layer_decay"):
        with pytest.raises(ValueError, match=f"'{name}': it is taken"):
            register_depth(name, lambda x, s: 1.0)
