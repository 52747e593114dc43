"""From runs to words, tables and plots: docs/evidence.md and what the library quotes of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_studies import Study
from evidence_words import (
    NO_DIFFERENCE,
    WORSE,
    ArmResult,
    Comparison,
    Interval,
    Metric,
    Runs,
    Sweep,
    compare,
)

NAMES: Mapping[str, str] = {
    "linear": "depth strategy",
    "cosine": "depth strategy",
    "inverted_u": "depth strategy",
    "layer_decay": "depth strategy",
    "table": "depth strategy",
    "style_lora": "preset",
    "subject_lora": "preset",
    "concept_lora": "preset",
    "full_finetune": "preset",
    "component_only": "preset",
    "conservative": "preset",
    "rfdetr": "preset",
    "component_lr": "rates by component",
    "lora_plus_ratio": "LoRA+",
    "advise": "proposed rates",
}
"""What a config can choose, and the kind of it."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the runs of one study say."""

    study: Study
    seeds: int
    results: Mapping[str, ArmResult]
    comparisons: tuple[Comparison, ...]

    @property
    def valid(self) -> bool:
        """Whether the control lost to the baseline: else the study can tell nothing apart."""
        return self.word(self.study.control).word == WORSE

    def word(self, arm: str) -> Comparison:
        """What the first metric says of an arm."""
        first = self.study.metrics[0].name
        return next(c for c in self.comparisons if c.arm == arm and c.metric == first)


def analyse(study: Study, runs: Runs) -> Analysis:
    """Compare every arm with the baseline, and the pairs that the study names.

    Raises:
        Refused: an arm without a sweep, too few seeds, or seeds that differ.
    """
    sweeps = {arm.name: Sweep(runs, arm.name, study.metrics) for arm in study.arms}
    wanted = [(study.control, study.baseline)]
    for one in study.arms:
        # An arm of random weights is no way to finetune: it is compared by name only.
        same_start = one.pretrained == study.arm(study.baseline).pretrained
        if same_start and one.name not in (study.baseline, study.control):
            wanted.append((one.name, study.baseline))
    wanted.extend(study.pairs)
    found = []
    for metric in study.metrics:
        pairs = [pair for pair in wanted if metric is study.metrics[0] or _both(study, pair)]
        for arm, against in pairs:
            found.append(compare(sweeps[arm], sweeps[against], metric, len(pairs)))
    return Analysis(
        study=study,
        seeds=len(sweeps[study.baseline].seeds),
        results={name: sweep.result() for name, sweep in sweeps.items()},
        comparisons=tuple(found),
    )


def _both(study: Study, pair: tuple[str, str]) -> bool:
    """Whether both arms have something to forget."""
    return all(study.arm(name).pretrained for name in pair)


def section(analysis: Analysis, result: Mapping[str, Any]) -> str:
    """One study's part of the page."""
    study, lines = analysis.study, []
    setting = textwrap.fill(study.setting, 120, break_on_hyphens=False)
    lines += [f"## {study.title}", "", study.question, "", setting, ""]
    counts = [len(found.curve) for found in analysis.results.values()]
    rates = f"{min(counts)} to {max(counts)}" if min(counts) != max(counts) else str(counts[0])
    minutes = f"{result['seconds'] / 60:.0f} minutes in one process"
    said = f"{analysis.seeds} seeds, {rates} rates per arm, {len(result['runs'])} runs, {minutes}."
    lines += [textwrap.fill(f"{said} {_control_line(analysis)}", 120), ""]
    for metric in study.metrics:
        lines += _table(analysis, metric)
    edges = [name for name, found in analysis.results.items() if found.at_edge]
    if edges:
        named = ", ".join(f"`{name}`" for name in edges)
        lines += [f"Best at an end of its sweep, so perhaps not at its best: {named}.", ""]
    lines += [f"![{study.title}](../benchmarks/results/evidence_{study.name}.png)", ""]
    if study.picture is not None:
        picture = f"../benchmarks/results/evidence_{study.name}_samples.png"
        lines += [f"![What each arm generates at its best rate]({picture})", ""]
    return "\n".join(lines)


def _control_line(analysis: Analysis) -> str:
    control = f"The control (`{analysis.study.control}`)"
    if analysis.valid:
        return f"{control} is worse than `{analysis.study.baseline}`, as it must be."
    return (
        f"**{control} did not lose: this study cannot tell arms apart, and its words mean"
        " nothing.**"
    )


def _table(analysis: Analysis, metric: Metric) -> list[str]:
    best = "higher" if metric.higher_is_better else "lower"
    lines = [
        f"**{metric.name}** ({metric.unit}; {best} is better):",
        "",
        "| arm | best rate | reached | against | difference | verdict |",
        "|---|---|---|---|---|---|",
    ]
    compared: dict[str, list[Comparison]] = {}
    for one in analysis.comparisons:
        if one.metric == metric.name:
            compared.setdefault(one.arm, []).append(one)
    for name, found in analysis.results.items():
        arm = analysis.study.arm(name)
        if not arm.pretrained and metric is not analysis.study.metrics[0]:
            continue
        start = f"| {name}: {arm.what} | {found.best_rate:g} | {shown(found.values[metric.name])} |"
        if name not in compared:
            lines.append(f"{start} | | |")
        for one in compared.get(name, ()):
            lines.append(f"{start} {one.against} | {shown(one.difference, True)} | {one.word} |")
    return [*lines, ""]


def shown(value: Interval, signed: bool = False) -> str:
    """A mean and its interval, to as many digits as the interval makes sense of."""
    width = value.high - value.low
    digits = 1 if width >= 1 else 2 if width >= 0.1 else 3 if width >= 0.01 else 4
    sign = "+" if signed else ""
    mean, low, high = (f"{x:{sign}.{digits}f}" for x in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"


def findings(name: str, analyses: Sequence[Analysis]) -> list[str]:
    """What was found of one name: a sentence without its full stop for each study."""
    found = []
    for analysis in analyses:
        parts = []
        for metric in analysis.study.metrics:
            said = _said(name, analysis, metric)
            if said:
                parts.append(f"{metric.name} {', '.join(said)}")
        if parts:
            doubt = "" if analysis.valid else " (its control did not lose: this means nothing)"
            where = f"{analysis.study.short} ({analysis.seeds} seeds)"
            found.append(f"{where}: {'; '.join(parts)}{doubt}")
    return found


def _said(name: str, analysis: Analysis, metric: Metric) -> list[str]:
    """``better than flat (arm, arm)`` for each word that the arms of a name were given."""
    arms: dict[str, list[str]] = {}
    for one in analysis.comparisons:
        if one.metric == metric.name and name in analysis.study.arm(one.arm).measures:
            than = "to" if one.word == NO_DIFFERENCE else "than"
            arms.setdefault(f"{one.word} {than} {one.against}", []).append(one.arm)
    said = []
    for phrase, names in arms.items():
        # An arm that is called as the name itself need not be said again.
        said.append(phrase if names == [name] else f"{phrase} ({', '.join(names)})")
    return said


def evidence(analyses: Sequence[Analysis]) -> dict[str, str]:
    """{name: what was measured of it, in one line}."""
    lines = {}
    for name in NAMES:
        found = findings(name, analyses)
        lines[name] = ". ".join(found) if found else NOT_MEASURED
    return lines


def overview(analyses: Sequence[Analysis]) -> str:
    """The table of every name that a config can choose."""
    lines = [
        "| | kind | measured | when not to use it |",
        "|---|---|---|---|",
    ]
    for name, line in evidence(analyses).items():
        lines.append(f"| `{name}` | {NAMES[name]} | {line} | {_when_not(name, analyses)} |")
    return "\n".join(lines) + "\n"


def _when_not(name: str, analyses: Sequence[Analysis]) -> str:
    """Settings in which an arm of this name lost, in any metric."""
    found = []
    for analysis in analyses:
        for one in analysis.comparisons:
            arm = analysis.study.arm(one.arm)
            if name in arm.measures and one.word == WORSE and analysis.valid:
                where = f"{analysis.study.short} (`{one.arm}`: {one.metric}"
                found.append(f"{where} {shown(one.difference, True)} to `{one.against}`)")
    if found:
        return "; ".join(found)
    measured = any(findings(name, [analysis]) for analysis in analyses)
    return "no setting was found in which it loses" if measured else "unknown"


INTRODUCTION = """# Do per-layer learning rates help?

This page is written by `python benchmarks/does_it_help.py --report` from the runs in
`benchmarks/results/evidence_*.json`; the verdicts follow from intervals by code
(`benchmarks/evidence_words.py`), whatever they say. All models here are small enough for a CPU: a
verdict is about its own setting, and a hint elsewhere.

- Every arm has a sweep of its own over base rates (an arm without one is refused), extended where
  its best rate is an end. Rates come from the library's own plan and are verified at the start of
  every run.
- Best against best. For each seed an arm takes the rate that the other seeds choose, so that no arm
  gains by choosing among its own draws. A run that diverged counts as the worst run of its study.
- Differences are paired by seed: all arms of a seed share weights, data and order. In square
  brackets: Student's interval, widened for the choice of rates (corrected resampled t-test), at
  95 % for all comparisons of a table together (of `reached`: each by itself). `better` and `worse`
  if it leaves out zero, else `no difference`: none was shown, and one smaller than the interval may
  exist.
- Every study has a control that must lose. If it does not, the study says so and proves nothing.
"""
LEFT_OUT = """Not measured at all: anything at the size of a published model; the presets' absolute
rates (their ratios are, scaled together); decay to an absolute floor, which the library's schedules
do not have.
"""


def page(
    analyses: Sequence[Analysis],
    results: Mapping[str, Mapping[str, Any]],
    waiting: Sequence[Study] = (),
) -> str:
    """The whole of docs/evidence.md; ``waiting`` are studies without runs."""
    parts = [INTRODUCTION, "## What is known of each choice\n", overview(analyses)]
    parts.append(LEFT_OUT)
    for study in waiting:
        parts.append(f"Written, but not run yet: {study.title} (`--only {study.name}`).\n")
    for analysis in analyses:
        parts.append(section(analysis, results[analysis.study.name]))
    return "\n".join(parts).rstrip() + "\n"


def plot(analysis: Analysis, file: Path) -> None:
    """Draw the first metric over the rate, for every arm, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = analysis.study.metrics[0]
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    low, high = _scale(analysis)
    # Of the usual ten colours the eleventh arm would have the first one's.
    colours = pyplot.get_cmap("tab20" if len(analysis.results) > 10 else "tab10")
    for number, (name, found) in enumerate(analysis.results.items()):
        rates = list(found.curve)
        means = [one.mean for one in found.curve.values()]
        lows = [one.mean - one.low for one in found.curve.values()]
        style = "--" if not analysis.study.arm(name).pretrained else "-"
        # Points of several arms lie at one rate: moved apart, their bars can be told apart.
        places = [rate * 1.03 ** (number - len(analysis.results) / 2) for rate in rates]
        label = name if any(low <= mean <= high for mean in means) else f"{name} (off the scale)"
        shape = {"label": label, "capsize": 2, "linestyle": style, "color": colours(number)}
        axis.errorbar(places, means, yerr=lows, **shape)
    axis.set(xscale="log", xlabel="base rate", ylabel=f"{metric.name} ({metric.unit})")
    axis.set_ylim(low, high)
    ticks = _ticks(analysis)
    axis.set_xticks(ticks, labels=[f"{rate:g}" for rate in ticks])
    axis.minorticks_off()
    axis.set_title(f"{analysis.study.title} ({analysis.seeds} seeds, 95 % intervals)", fontsize=10)
    axis.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _scale(analysis: Analysis) -> tuple[float, float]:
    """Ends of the axis: what arms that start as the baseline does reach; a control lies far off."""
    study = analysis.study
    start = study.arm(study.baseline).pretrained
    values: list[float] = []
    for name, found in analysis.results.items():
        if study.arm(name).pretrained == start and name != study.control:
            for one in found.curve.values():
                values += [one.low, one.high]
    room = 0.05 * (max(values) - min(values))
    return min(values) - room, max(values) + room


def _ticks(analysis: Analysis) -> list[float]:
    """Rates of the sweeps that stand far enough apart for their labels."""
    ticks: list[float] = []
    for rate in sorted({rate for found in analysis.results.values() for rate in found.curve}):
        if not ticks or rate >= 1.5 * ticks[-1]:
            ticks.append(rate)
    return ticks
