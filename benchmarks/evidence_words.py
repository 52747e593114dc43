"""What measured runs say, in words that follow from intervals. Pure arithmetic.

An arm is one way of setting rates, swept over base rates. Arms are compared best against best. The
rate of an arm is chosen for each seed by the other seeds alone, so an arm with more rates, or with
noisier runs, gains nothing by choosing among its own draws. Differences are paired by seed, since
all arms of a seed share data, order and initial weights. Their interval is Student's, widened since
the choices of all seeds were made from largely the same runs (Nadeau and Bengio, 2003: without it,
arms that are alike differed in up to a fifth of simulated studies), at 95 % for all comparisons of
a study together (Bonferroni). The word is read off it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
MIN_RATES = 3
MIN_SEEDS = 3
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference"
Runs = Mapping[tuple[str, float, int], Mapping[str, float]]
"""(arm, base rate, seed) -> {metric: value}."""


class Refused(ValueError):
    """Runs that nothing can be concluded from."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that a run ends with."""

    name: str
    unit: str
    """What the report writes behind it."""
    higher_is_better: bool

    def worst(self, values: Iterable[float]) -> float:
        """The worst finite one, which stands in for a run that diverged."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            raise Refused(f"No finite {self.name}: every run diverged.")
        return min(finite) if self.higher_is_better else max(finite)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another, in one metric."""

    arm: str
    against: str
    metric: str
    word: str
    """``better``, ``worse`` or ``no difference``: about ``arm``."""
    difference: Interval
    """Arm minus the other, paired by seed."""


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What one arm reached at its own best rate."""

    arm: str
    best_rate: float
    """Best on the mean of all seeds: what a user would take."""
    at_edge: bool
    """Whether that is an end of the sweep, so that a better rate may lie beyond."""
    values: Mapping[str, Interval]
    """By metric, each seed at the rate that the other seeds chose; 95 % by itself."""
    curve: Mapping[float, Interval]
    """By rate, in the first metric; 95 % by itself."""


class Sweep:
    """The runs of one arm, complete: every rate under every seed."""

    def __init__(self, runs: Runs, arm: str, metrics: Sequence[Metric]):
        """Take the runs of one arm.

        Args:
            runs: Of a whole study.
            arm: Which to take.
            metrics: The first one chooses rates.

        Raises:
            Refused: Fewer than three rates or seeds, or a rate that lacks a seed.
        """
        own = {(rate, seed): found for (name, rate, seed), found in runs.items() if name == arm}
        self.arm, self.metrics = arm, tuple(metrics)
        self.rates = sorted({rate for rate, _ in own})
        self.seeds = sorted({seed for _, seed in own})
        if len(self.rates) < MIN_RATES:
            raise Refused(
                f"Arm {arm!r} has runs at {len(self.rates)} rates: an arm without a sweep of its"
                f" own, {MIN_RATES} rates or more, is compared with nothing. Run more rates."
            )
        if len(self.seeds) < MIN_SEEDS:
            raise Refused(
                f"Arm {arm!r} has {len(self.seeds)} seeds: an interval needs {MIN_SEEDS} or more."
                " Run more seeds."
            )
        lacking = [(r, s) for r in self.rates for s in self.seeds if (r, s) not in own]
        if lacking:
            raise Refused(f"Arm {arm!r} lacks (rate, seed) {lacking[0]}. Run the study again.")
        self._own = _without_divergence(own, runs, self.metrics)

    def chosen(self, seed: int) -> float:
        """The rate that all other seeds together choose."""
        return self._best([other for other in self.seeds if other != seed])

    def best(self) -> float:
        """The rate that all seeds together choose."""
        return self._best(self.seeds)

    def nested(self, metric: str) -> dict[int, float]:
        """{seed: value at the rate that the other seeds chose}."""
        return {seed: self._own[self.chosen(seed), seed][metric] for seed in self.seeds}

    def at(self, rate: float, metric: str) -> list[float]:
        """Values of all seeds at one rate."""
        return [self._own[rate, seed][metric] for seed in self.seeds]

    def result(self) -> ArmResult:
        """Everything that a report says of this arm alone."""
        best, first = self.best(), self.metrics[0]
        values = {}
        for metric in self.metrics:
            values[metric.name] = nested_interval(list(self.nested(metric.name).values()))
        return ArmResult(
            arm=self.arm,
            best_rate=best,
            at_edge=best in (self.rates[0], self.rates[-1]),
            values=values,
            curve={rate: interval(self.at(rate, first.name)) for rate in self.rates},
        )

    def _best(self, seeds: Sequence[int]) -> float:
        first = self.metrics[0]
        sign = 1 if first.higher_is_better else -1

        def score(rate: float) -> float:
            return sign * sum(self._own[rate, seed][first.name] for seed in seeds)

        # Of equal rates the smallest, whatever order the runs came in.
        return max(self.rates, key=score)


def _without_divergence(
    own: Mapping[tuple[float, int], Mapping[str, float]], runs: Runs, metrics: Sequence[Metric]
) -> dict[tuple[float, int], dict[str, float]]:
    """Values with the study's worst finite one wherever a run diverged."""
    cleaned: dict[tuple[float, int], dict[str, float]] = {key: {} for key in own}
    for metric in metrics:
        worst = metric.worst(found[metric.name] for found in runs.values())
        for key, found in own.items():
            value = found[metric.name]
            cleaned[key][metric.name] = value if math.isfinite(value) else worst
    return cleaned


def compare(
    arm: Sweep, against: Sweep, metric: Metric, comparisons: int = 1, level: float = LEVEL
) -> Comparison:
    """Compare two arms, each at its own best rate.

    Args:
        arm: Whom the word is about.
        against: The other.
        metric: In which number.
        comparisons: How many of a study share the level.
        level: That all of their intervals hold together.

    Raises:
        Refused: They were not run under the same seeds, so nothing can be paired.
    """
    if arm.seeds != against.seeds:
        raise Refused(
            f"Arms {arm.arm!r} and {against.arm!r} have seeds {arm.seeds} and {against.seeds}:"
            " differences are paired by seed. Run both under the same seeds."
        )
    mine, theirs = arm.nested(metric.name), against.nested(metric.name)
    differences = [mine[seed] - theirs[seed] for seed in arm.seeds]
    found = nested_interval(differences, 1 - (1 - level) / comparisons)
    return Comparison(
        arm=arm.arm,
        against=against.arm,
        metric=metric.name,
        word=word_of(found, metric.higher_is_better),
        difference=found,
    )


def word_of(difference: Interval, higher_is_better: bool) -> str:
    """The word for a difference: neither is claimed while the interval holds zero."""
    if difference.low <= 0 <= difference.high:
        return NO_DIFFERENCE
    return BETTER if (difference.low > 0) == higher_is_better else WORSE


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's interval of the mean of independent values."""
    mean = statistics.fmean(values)
    # Subtracting a rounded mean from equal values leaves dust, which would be an interval.
    spread = statistics.stdev(values) if len(set(values)) > 1 else 0.0
    half = t_quantile(level, len(values) - 1) * spread / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def nested_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The interval of a mean over seeds, each at the rate that the other seeds chose.

    The variance of the mean is that of the corrected resampled t-test: 1 tested seed and n - 1 that
    chose make it 1/n + 1/(n - 1) of the seeds' variance, not 1/n.
    """
    found, count = interval(values, level), len(values)
    half = (found.high - found.mean) * math.sqrt(1 + count / (count - 1))
    return Interval(mean=found.mean, low=found.mean - half, high=found.mean + half)


def t_quantile(level: float, freedom: int) -> float:
    """The t between whose negative and itself lies ``level`` of Student's distribution."""
    low, high = 0.0, 1.0
    while _within(high, freedom) < level:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom: the finite series of A&S 26.7."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
