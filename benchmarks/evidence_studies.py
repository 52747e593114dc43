"""A study: arms, each swept over rates of its own, under the same seeds; resumable, run by seed.

Every finished run is one line of a file, so a killed study continues where it stopped. Seeds are
shared out among processes. An arm whose best rate is an end of its sweep is given another rate
beyond that end, so that no arm loses because its sweep was placed badly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from evidence_words import MIN_RATES, MIN_SEEDS, Metric, Refused, Sweep

Config = dict[str, Any]
Row = dict[str, Any]
Run = tuple[str, float, int]
"""(arm, base rate, seed)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of setting rates; ``config`` is what the library plans them from."""

    name: str
    what: str
    """A few words for the report."""
    config: Callable[[float], Config]
    """Base rate -> config of ``dist_layerlr.plan_model``."""
    measures: tuple[str, ...] = ()
    """Depth strategies, presets and fields that this arm is a measurement of."""
    pretrained: bool = True
    """Whether it starts from the pretrained weights, or from random ones."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a study runs."""

    seeds: int
    rates: tuple[float, ...]
    """The first sweep of every arm."""
    extensions: int = 0
    """Rates added beyond an end of a sweep that is its best, at most."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """Steps and the like, for the study's own ``run``."""
    arms: tuple[str, ...] = ()
    """Only these; empty: all."""

    def __post_init__(self) -> None:
        """Refuse what could not be analysed.

        Raises:
            Refused: too few seeds or rates.
        """
        if self.seeds < MIN_SEEDS or len(set(self.rates)) < MIN_RATES:
            raise Refused(
                f"{self.seeds} seeds, {len(set(self.rates))} rates: a study needs at least"
                f" {MIN_SEEDS} seeds and {MIN_RATES} rates of every arm."
            )


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is asked, on what, and how it is measured."""

    name: str
    title: str
    short: str
    """On what, in a few words."""
    question: str
    setting: str
    """Model, data, steps: what a reader must know to judge the answer."""
    arms: tuple[Arm, ...]
    baseline: str
    control: str
    """An arm that must be worse than the baseline; if it is not, the study can show nothing."""
    metrics: tuple[Metric, ...]
    """The first one chooses rates."""
    full: Size
    quick: Size
    run: Callable[[Arm, float, int, Mapping[str, int], Path], dict[str, float]]
    """(arm, base rate, seed, settings, cache folder) -> {metric: value}."""
    pairs: tuple[tuple[str, str], ...] = ()
    """More comparisons (arm, against) than those with the baseline."""
    picture: Callable[[Mapping[str, float], Mapping[str, int], Path, Path], None] | None = None
    """({arm: best rate}, settings, cache folder, file to write): samples side by side."""

    def arm(self, name: str) -> Arm:
        """An arm by name."""
        return next(arm for arm in self.arms if arm.name == name)

    def sized(self, quick: bool) -> Study:
        """The study with the arms of that size alone."""
        names = self.size(quick).arms
        if not names:
            return self
        arms = tuple(arm for arm in self.arms if arm.name in names)
        pairs = tuple(pair for pair in self.pairs if set(pair) <= set(names))
        return replace(self, arms=arms, pairs=pairs)

    def size(self, quick: bool) -> Size:
        """The one asked for."""
        return self.quick if quick else self.full

    def fingerprint(self, quick: bool) -> str:
        """What runs must agree in to stand in one table: the settings, and each arm's config."""
        configs = {arm.name: [arm.config(1.0), arm.pretrained] for arm in self.arms}
        said = [self.setting, dict(self.size(quick).settings), configs]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def measure(
    study: Study, folder: Path, quick: bool, workers: int, until: float = math.inf
) -> list[Row]:
    """Run what is not in the study's file yet.

    Args:
        study: What to run.
        folder: Holds the file of runs, and what runs keep for each other.
        quick: The small size.
        workers: Processes, each of which takes a seed at a time.
        until: ``time.time()`` after which no run is started.

    Returns:
        The runs to conclude from, see ``complete``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = study.size(quick)
    extra: dict[str, list[float]] = {arm.name: [] for arm in study.arms}
    for extension in range(size.extensions + 1):
        done = {_run_of(row) for row in read_rows(study, folder, quick)}
        todo = []
        for seed in range(size.seeds):
            wanted = [
                (arm.name, rate, seed)
                for arm in study.arms
                for rate in (*size.rates, *extra[arm.name])
            ]
            todo.append([run for run in wanted if run not in done])
        _run_all(study, folder, quick, workers, todo, until)
        if time.time() > until or extension == size.extensions:
            break
        # Rates that an earlier, smaller study added are not there for every seed yet.
        rows = complete(study, read_rows(study, folder, quick), quick)
        for name, rate in _beyond(study, rows).items():
            extra[name].append(rate)
    return complete(study, read_rows(study, folder, quick), quick)


def file_of(study: Study, folder: Path, quick: bool) -> Path:
    """Where a study's runs are written, one per line."""
    return folder / f"{study.name}{'_quick' if quick else ''}.jsonl"


def read_rows(study: Study, folder: Path, quick: bool) -> list[Row]:
    """Finished runs of the study as it is now; those of earlier settings are left out."""
    file = file_of(study, folder, quick)
    if not file.exists():
        return []
    whole, _, torn = file.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        # A run that was killed while it wrote: the next one would continue its line.
        file.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    mine = study.fingerprint(quick)
    return [row for row in rows if row["fingerprint"] == mine]


def runs_of(rows: Sequence[Row]) -> dict[Run, dict[str, float]]:
    """Rows as the analysis takes them."""
    return {_run_of(row): row["metrics"] for row in rows}


def complete(study: Study, rows: Sequence[Row], quick: bool) -> list[Row]:
    """Only seeds that have every arm's first sweep, and rates that all of them have.

    So a study that was cut short still shows what it can; differences are paired by seed.
    """
    runs = {_run_of(row) for row in rows}
    rates = study.size(quick).rates
    whole = set()
    # Seeds beyond those asked for may be of a study that was stopped, or lack the added rates.
    for seed in range(study.size(quick).seeds):
        if all((arm.name, rate, seed) in runs for arm in study.arms for rate in rates):
            whole.add(seed)
    kept = []
    for row in rows:
        arm, rate, seed = _run_of(row)
        if seed in whole and all((arm, rate, other) in runs for other in whole):
            kept.append(row)
    return kept


def _run_of(row: Row) -> Run:
    return row["arm"], row["rate"], row["seed"]


def _run_all(
    study: Study,
    folder: Path,
    quick: bool,
    workers: int,
    todo: list[list[Run]],
    until: float,
) -> None:
    """Run all seeds, in processes of their own if there are to be several."""
    tasks = [(study.name, folder, quick, runs, until) for runs in todo if runs]
    if workers == 1:
        for task in tasks:
            _run_seed(*task, study=study)
        return
    # Processes are started anew: threads of torch do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_run_seed, *task) for task in tasks]
        for future in as_completed(futures):
            future.result()


def _run_seed(
    name: str,
    folder: Path,
    quick: bool,
    runs: list[Run],
    until: float,
    study: Study | None = None,
) -> None:
    """Do the runs of one seed, and write each down when it is done."""
    import torch

    if study is None:
        # In a process of its own: functions of a study cannot be sent to it, its name can.
        from does_it_help import STUDIES

        study = STUDIES[name].sized(quick)
    torch.set_num_threads(1)
    file, size = file_of(study, folder, quick), study.size(quick)
    for arm, rate, seed in runs:
        if time.time() > until:
            return
        start = time.perf_counter()
        metrics = study.run(study.arm(arm), rate, seed, size.settings, folder)
        row = {
            "study": study.name,
            "fingerprint": study.fingerprint(quick),
            "arm": arm,
            "rate": rate,
            "seed": seed,
            "metrics": metrics,
            "seconds": round(time.perf_counter() - start, 2),
        }
        # One write of one short line: lines of several processes do not mix.
        with open(file, "ab", buffering=0) as out:
            out.write((json.dumps(row) + "\n").encode())


def _beyond(study: Study, rows: Sequence[Row]) -> dict[str, float]:
    """{arm: a rate beyond the end of its sweep that is its best}."""
    runs = runs_of(rows)
    found = {}
    for arm in study.arms:
        sweep = Sweep(runs, arm.name, study.metrics)
        best, rates = sweep.best(), sweep.rates
        if best == rates[0]:
            found[arm.name] = _rounded(rates[0] ** 2 / rates[1])
        elif best == rates[-1]:
            found[arm.name] = _rounded(rates[-1] ** 2 / rates[-2])
    return found


def _rounded(rate: float) -> float:
    """Three digits: what a log shows is then what was run."""
    return float(f"{rate:.3g}")


def result_of(study: Study, rows: Sequence[Row], quick: bool) -> dict[str, Any]:
    """What is committed: the settings, and every run."""
    import platform

    import torch

    return {
        "study": study.name,
        "fingerprint": rows[0]["fingerprint"],
        "settings": dict(study.size(quick).settings),
        "seeds": sorted({row["seed"] for row in rows}),
        "metrics": [asdict(metric) for metric in study.metrics],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "seconds": round(sum(row["seconds"] for row in rows)),
        "runs": [
            [row["arm"], row["rate"], row["seed"], row["metrics"]]
            for row in sorted(rows, key=_run_of)
        ],
    }


def write_whole(file: Path, text: str) -> None:
    """Write a text file, or leave the old one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)
