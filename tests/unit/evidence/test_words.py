"""Words about arms follow from their runs: known effects are named, chance is not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evidence_words import (
    BETTER,
    NO_DIFFERENCE,
    WORSE,
    Metric,
    Refused,
    Runs,
    Sweep,
    compare,
    interval,
    nested_interval,
    t_quantile,
    word_of,
)

SCORE = Metric(name="score", unit="%", higher_is_better=True)
LOSS = Metric(name="loss", unit="nats", higher_is_better=False)
RATES = (0.1, 0.2, 0.4, 0.8)
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 120: 1.980}
"""Printed in any table of Student's t: degrees of freedom -> two-sided 95 %."""


def runs_of(arms: dict[str, dict[float, list[float]]], metric: str = "score") -> Runs:
    return {
        (arm, rate, seed): {metric: value}
        for arm, rates in arms.items()
        for rate, values in rates.items()
        for seed, value in enumerate(values)
    }


def drawn(
    random: np.random.Generator,
    seeds: int,
    offs: tuple[float, ...] = (-4, 0, -1, -6),
    **effects: float,
) -> Runs:
    """Arms that differ by an effect, with what each rate loses; a seed shifts all arms alike, far
    more than noise does."""
    shift = random.normal(0, 10, seeds)
    arms: dict[str, dict[float, list[float]]] = {}
    for arm, effect in effects.items():
        arms[arm] = {}
        for rate, off in zip(RATES, offs, strict=True):
            noise = random.normal(0, 1, seeds)
            arms[arm][rate] = list(50 + shift + effect + off + noise)
    return runs_of(arms)


def word(runs: Runs, arm: str, against: str, metric: Metric = SCORE) -> str:
    sweeps = [Sweep(runs, name, [metric]) for name in (arm, against)]
    return compare(*sweeps, metric).word


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_those_of_the_printed_table(freedom: int) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(TABLE[freedom], abs=6e-4)


def test_quantiles_at_other_levels_are_those_of_the_printed_table() -> None:
    assert t_quantile(0.99, 4) == pytest.approx(4.604, abs=6e-4)
    assert t_quantile(0.999, 9) == pytest.approx(4.781, abs=6e-4)
    assert t_quantile(0.90, 1) == pytest.approx(6.314, abs=6e-4)


def test_a_nested_interval_is_wider_by_the_seeds_that_chose() -> None:
    plain, nested = interval([1.0, 2.0, 3.0]), nested_interval([1.0, 2.0, 3.0])
    # 1/3 + 1/2 of the seeds' variance in place of 1/3.
    assert nested.high - 2.0 == pytest.approx((plain.high - 2.0) * math.sqrt(2.5))
    assert nested.low - 2.0 == pytest.approx((plain.low - 2.0) * math.sqrt(2.5))


def test_an_interval_is_the_one_computed_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])
    # The mean of three values of standard deviation 1, at 2 degrees of freedom.
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert found.low - 2.0 == pytest.approx(-4.303 / math.sqrt(3), abs=1e-3)


@pytest.mark.parametrize("seeds", [3, 6])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    random, trials = np.random.default_rng(seeds), 2000
    held = 0
    for _ in range(trials):
        found = interval(list(random.normal(7.0, 3.0, seeds)), 0.9)
        held += found.low <= 7.0 <= found.high
    # Four standard deviations of a binomial share of 0.9.
    assert abs(held / trials - 0.9) < 4 * math.sqrt(0.09 / trials)


def test_known_effects_are_named_although_seeds_differ_by_far_more() -> None:
    runs = drawn(np.random.default_rng(0), 10, flat=0.0, up=5.0, down=-5.0, same=0.0)
    assert word(runs, "up", "flat") == BETTER
    assert word(runs, "down", "flat") == WORSE
    assert word(runs, "same", "flat") == NO_DIFFERENCE


def test_a_lower_loss_is_better() -> None:
    arms = {
        "flat": {r: [2.0, 2.1, 2.2] for r in RATES},
        "low": {r: [1.0, 1.11, 1.19] for r in RATES},
    }
    runs = runs_of(arms, "loss")
    assert word(runs, "low", "flat", LOSS) == BETTER
    assert word(runs, "flat", "low", LOSS) == WORSE


def test_swapping_the_labels_of_two_arms_swaps_the_words() -> None:
    runs = drawn(np.random.default_rng(1), 10, flat=0.0, up=5.0)
    other = {"flat": "up", "up": "flat"}
    swapped = {(other[arm], rate, seed): found for (arm, rate, seed), found in runs.items()}
    assert (word(runs, "up", "flat"), word(swapped, "up", "flat")) == (BETTER, WORSE)


@pytest.mark.parametrize("offs", [(-4, 0, -1, -6), (0, 0, 0, 0)])
def test_arms_that_are_alike_differ_no_more_often_than_the_level_says(
    offs: tuple[float, ...],
) -> None:
    """Where rates are nearly alike their choice is chance, and Student's own interval is left in a
    fifth of the trials."""
    random, trials, wrong = np.random.default_rng(2), 300, 0
    for _ in range(trials):
        runs = drawn(random, 10, offs, flat=0.0, same=0.0)
        wrong += word(runs, "same", "flat") != NO_DIFFERENCE
    assert wrong / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_choosing_among_many_noisy_rates_gains_nothing() -> None:
    """Of forty rates that are all alike, the best run of each seed would look far better."""
    random, trials, words = np.random.default_rng(3), 60, []
    means = []
    for _ in range(trials):
        few = {rate: list(random.normal(0, 1, 6)) for rate in RATES[:3]}
        many = {float(rate): list(random.normal(0, 1, 6)) for rate in range(1, 41)}
        sweeps = [Sweep(runs_of({"few": few, "many": many}), a, [SCORE]) for a in ("many", "few")]
        found = compare(*sweeps, SCORE)
        words.append(found.word)
        means.append(found.difference.mean)
    assert words.count(BETTER) <= 6
    # By the maximum of its own runs, the many would be ahead by 1.3 on average.
    assert abs(sum(means) / trials) < 0.3


def test_more_comparisons_make_intervals_wider() -> None:
    runs = drawn(np.random.default_rng(4), 5, flat=0.0, up=1.0)
    sweeps = [Sweep(runs, name, [SCORE]) for name in ("up", "flat")]
    one, ten = (compare(*sweeps, SCORE, count).difference for count in (1, 10))
    ratio = (ten.high - ten.low) / (one.high - one.low)
    assert ratio == pytest.approx(5.598 / 2.776, abs=2e-3)  # 99.5 % over 95 %, 4 degrees


@pytest.mark.parametrize(
    ("rates", "seeds", "says"),
    [(1, 5, "without a sweep"), (2, 5, "without a sweep"), (3, 2, "2 seeds")],
)
def test_an_arm_without_a_sweep_or_seeds_is_refused(rates: int, seeds: int, says: str) -> None:
    arms = {"flat": {rate: [1.0] * seeds for rate in RATES[:rates]}}
    with pytest.raises(Refused, match=says):
        Sweep(runs_of(arms), "flat", [SCORE])


def test_a_sweep_with_a_hole_is_refused() -> None:
    runs = dict(runs_of({"flat": {rate: [1.0, 2.0, 3.0] for rate in RATES}}))
    del runs["flat", 0.4, 1]
    with pytest.raises(Refused, match=r"lacks \(rate, seed\) \(0.4, 1\)"):
        Sweep(runs, "flat", [SCORE])


def test_arms_of_different_seeds_are_not_paired() -> None:
    three = runs_of({"flat": {rate: [1.0, 2.0, 3.0] for rate in RATES}})
    four = runs_of({"up": {rate: [1.0, 2.0, 3.0, 4.0] for rate in RATES}})
    runs = {**three, **four}
    with pytest.raises(Refused, match="paired by seed"):
        word(runs, "up", "flat")


def test_a_run_that_diverged_counts_as_the_worst_of_the_study() -> None:
    arms = {
        "flat": {0.1: [5.0, 6.0, 7.0], 0.2: [6.0, 7.0, 8.0], 0.4: [1.0, 2.0, 3.0]},
        "wild": {0.1: [6.0, 7.0, 8.0], 0.2: [math.nan] * 3, 0.4: [math.inf, math.nan, 0.5]},
    }
    wild = Sweep(runs_of(arms), "wild", [SCORE])
    assert wild.best() == 0.1
    assert wild.at(0.2, "score") == [0.5, 0.5, 0.5]
    assert wild.at(0.4, "score") == [0.5, 0.5, 0.5]


def test_a_best_rate_at_an_end_is_said() -> None:
    arms = {
        "end": {0.1: [1.0] * 3, 0.2: [2.0] * 3, 0.4: [3.0] * 3},
        "inside": {0.1: [1.0] * 3, 0.2: [4.0] * 3, 0.4: [3.0] * 3},
    }
    found = {name: Sweep(runs_of(arms), name, [SCORE]).result() for name in arms}
    assert (found["end"].best_rate, found["end"].at_edge) == (0.4, True)
    assert (found["inside"].best_rate, found["inside"].at_edge) == (0.2, False)


def test_the_first_metric_chooses_the_rate_at_which_the_others_are_read() -> None:
    runs = {
        ("a", rate, seed): {"score": score, "loss": loss}
        for rate, score, loss in ((0.1, 1.0, 0.0), (0.2, 9.0, 5.0), (0.4, 2.0, 1.0))
        for seed in range(3)
    }
    assert Sweep(runs, "a", [SCORE, LOSS]).nested("loss") == {0: 5.0, 1: 5.0, 2: 5.0}


def test_equal_runs_are_no_difference() -> None:
    assert word_of(interval([0.0, 0.0, 0.0]), True) == NO_DIFFERENCE
