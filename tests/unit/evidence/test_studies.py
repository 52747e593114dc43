"""A study runs what is missing, extends a sweep whose end is best, and reports what it found."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from evidence_report import Analysis, analyse, evidence, page, section
from evidence_studies import (
    Arm,
    Row,
    Size,
    Study,
    complete,
    file_of,
    measure,
    read_rows,
    result_of,
    runs_of,
)
from evidence_words import BETTER, WORSE, Metric, Refused

EFFECTS = {"flat": 0.0, "good": 9.0, "bad": -9.0, "scratch": -30.0}
PEAK = 0.2
"""The base rate that is best for all arms."""
CALLS: list[tuple[str, float, int]] = []


def run(
    arm: Arm, rate: float, seed: int, settings: Mapping[str, int], folder: Path
) -> dict[str, float]:
    CALLS.append((arm.name, rate, seed))
    # What no arm can do anything about, and a little noise that is another in every run.
    noise = 5.0 * seed + (zlib.crc32(f"{arm.name} {rate} {seed}".encode()) % 7) / 70
    distance = abs(settings["steps"] * (rate / PEAK - PEAK / rate))
    return {"score": 50 + EFFECTS[arm.name] - distance + noise}


def config(rate: float) -> dict[str, object]:
    return {"learning_rate": rate}


def study(**changes: object) -> Study:
    arms = []
    for name in EFFECTS:
        measures = ("linear",) if name in ("good", "bad") else ()
        start = name != "scratch"
        arms.append(Arm(name=name, what=name, config=config, measures=measures, pretrained=start))
    made = Study(
        name="toy",
        title="A toy",
        short="a toy",
        question="Does it?",
        setting="Nothing.",
        arms=tuple(arms),
        baseline="flat",
        control="scratch",
        metrics=(Metric(name="score", unit="%", higher_is_better=True),),
        full=Size(seeds=4, rates=(0.1, 0.2, 0.4), extensions=2, settings={"steps": 3}),
        quick=Size(seeds=3, rates=(0.1, 0.2, 0.4), settings={"steps": 3}),
        run=run,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_calls() -> None:
    CALLS.clear()


def analysed(made: Study, rows: list[Row]) -> Analysis:
    return analyse(made, runs_of(rows))


def test_a_size_without_a_sweep_or_seeds_is_refused() -> None:
    for seeds, rates in ((2, (0.1, 0.2, 0.4)), (3, (0.1, 0.2)), (3, (0.1, 0.1, 0.2))):
        with pytest.raises(Refused, match="needs at least 3 seeds and 3 rates"):
            Size(seeds=seeds, rates=rates)


def test_every_arm_is_run_at_every_rate_under_every_seed_once(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    assert len(CALLS) == len(set(CALLS)) == len(rows) == 4 * 3 * 4
    assert measure(study(), tmp_path, False, 1) == rows
    assert len(CALLS) == 48


def test_a_killed_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = measure(study(), tmp_path, False, 1)
    file = file_of(study(), tmp_path, False)
    lines = file.read_text().splitlines(keepends=True)
    # Killed while the twenty-first line was written.
    file.write_text("".join(lines[:20]) + lines[20][:30])
    CALLS.clear()
    assert sorted(map(str, measure(study(), tmp_path, False, 1))) != []
    assert len(CALLS) == 48 - 20
    found = read_rows(study(), tmp_path, False)
    assert runs_of(found) == runs_of(whole)


def test_runs_of_other_settings_are_left_out(tmp_path: Path) -> None:
    measure(study(), tmp_path, False, 1)
    other = study(full=Size(seeds=4, rates=(0.1, 0.2, 0.4), settings={"steps": 4}))
    assert read_rows(other, tmp_path, False) == []
    more_seeds = study(full=dataclasses.replace(study().full, seeds=5))
    assert len(read_rows(more_seeds, tmp_path, False)) == 48


def test_a_sweep_whose_best_is_an_end_goes_on_beyond_it(tmp_path: Path) -> None:
    high = study(full=Size(seeds=3, rates=(0.8, 1.6, 3.2), extensions=3, settings={"steps": 3}))
    rows = measure(high, tmp_path, False, 1)
    assert {row["rate"] for row in rows} == {0.1, 0.2, 0.4, 0.8, 1.6, 3.2}
    found = analysed(high, rows).results
    # One rate more would be needed to see that 0.2 is the best.
    assert {(one.best_rate, one.at_edge) for one in found.values()} == {(0.2, False)}


def test_more_seeds_later_are_given_the_rates_that_were_added(tmp_path: Path) -> None:
    size = Size(seeds=3, rates=(0.4, 0.8, 1.6), extensions=3, settings={"steps": 3})
    few = measure(study(full=size), tmp_path, False, 1)
    CALLS.clear()
    more = study(full=dataclasses.replace(size, seeds=5))
    rows = measure(more, tmp_path, False, 1)
    rates = {0.1, 0.2, 0.4, 0.8, 1.6}
    assert {(row["rate"], row["seed"]) for row in rows} == {(r, s) for r in rates for s in range(5)}
    assert {seed for *_, seed in CALLS} == {3, 4} and len(CALLS) == 4 * 5 * 2
    # And fewer seeds again are those that were there first.
    assert runs_of(measure(study(full=size), tmp_path, False, 1)) == runs_of(few)


def test_only_seeds_that_every_arm_has_are_kept(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    lost = [r for r in rows if (r["arm"], r["rate"], r["seed"]) != ("bad", 0.4, 3)]
    kept = complete(study(), lost, False)
    assert {row["seed"] for row in kept} == {0, 1, 2}
    assert len(kept) == 4 * 3 * 3
    # A rate beyond the first sweep that one seed lacks is dropped, for all seeds.
    extra = [{**rows[0], "rate": 0.8, "seed": seed} for seed in range(3)]
    assert complete(study(), [*rows, *extra], False) == rows


def test_the_page_says_who_won_and_swapped_labels_swap_it(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    other = {"good": "bad", "bad": "good"}
    swapped = [{**row, "arm": other.get(row["arm"], row["arm"])} for row in rows]
    words = []
    for some in (rows, swapped):
        found = analysed(study(), some)
        words.append((found.word("good").word, found.word("bad").word))
        text = page([found], {"toy": result_of(study(), some, False)})
        first, second = words[-1]
        line = f"a toy (4 seeds): score {first} than flat (good), {second} than flat (bad)"
        assert f"| `linear` | depth strategy | {line} |" in text
        assert evidence([found])["linear"] == line
        assert "is worse than `flat`, as it must be" in " ".join(text.split())
    assert words == [(BETTER, WORSE), (WORSE, BETTER)]


def test_where_an_arm_lost_the_page_says_when_not_to_use_it(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    text = page([analysed(study(), rows)], {"toy": result_of(study(), rows, False)})
    (row,) = [line for line in text.splitlines() if line.startswith("| `linear` ")]
    assert "a toy (`bad`: score -9." in row and "to `flat`)" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| `cosine` ")]
    assert row == "| `cosine` | depth strategy | not measured | unknown |"


def test_a_control_that_does_not_lose_takes_the_words_their_meaning(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    other = {"scratch": "good", "good": "scratch"}
    swapped = [{**row, "arm": other.get(row["arm"], row["arm"])} for row in rows]
    found = analysed(study(), swapped)
    assert not found.valid
    assert "did not lose" in section(found, result_of(study(), swapped, False))
    assert evidence([found])["linear"].endswith("this means nothing)")


def test_an_arm_without_a_sweep_is_refused_by_the_report(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    one_rate = [row for row in rows if row["arm"] != "good" or row["rate"] == 0.2]
    with pytest.raises(Refused, match="'good' has runs at 1 rates"):
        analysed(study(), one_rate)


def test_a_result_holds_every_run(tmp_path: Path) -> None:
    rows = measure(study(), tmp_path, False, 1)
    result = json.loads(json.dumps(result_of(study(), rows, False)))
    assert len(result["runs"]) == 48
    assert result["seeds"] == [0, 1, 2, 3]
    assert {(a, r, s): m for a, r, s, m in result["runs"]} == runs_of(rows)
