"""Do per-layer learning rates help? Every arm swept, every claim an interval.

    python benchmarks/does_it_help.py                         # all studies, then the page and plots
    python benchmarks/does_it_help.py --only layer_decay --workers 2
    python benchmarks/does_it_help.py --quick --out quick     # a rehearsal; it says nothing
    python benchmarks/does_it_help.py --report                # page and plots from the JSON alone

Runs are written to runs/evidence one by one: what is stopped goes on where it stopped. Results and
plots go to benchmarks/results; docs/evidence.md, the list in docs/names.md and the lines that
`dist-layerlr plan` prints are written from the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evidence_advise
import evidence_lm
import evidence_prompt
import evidence_quotes
import evidence_vit
import evidence_wan
from evidence_report import Analysis, analyse, evidence, page, plot
from evidence_studies import Study, measure, result_of, write_whole
from evidence_words import Runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
RUNS = Path("runs/evidence")
PAGE = Path("docs/evidence.md")
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        evidence_vit.LAYER_DECAY,
        evidence_wan.DEPTH,
        evidence_wan.LORA_STYLE,
        evidence_prompt.WORD,
        evidence_lm.BLOCKWISE,
        evidence_vit.SURGICAL_INPUT,
        evidence_vit.SURGICAL_LABELS,
        evidence_advise.ADVISE_DECAY,
        evidence_advise.ADVISE_DEPTH,
    )
}


def main() -> None:
    """Run what is asked for, and write what it says."""
    parser = _parser()
    args = parser.parse_args()
    if args.quick and args.out.resolve() == ROOT:
        parser.error("--quick needs --out FOLDER: a rehearsal must not replace results")
    until = time.time() + 60 * args.minutes
    for name in [] if args.report else args.only or STUDIES:
        study = STUDIES[name].sized(args.quick)
        if args.seeds is not None:
            full, quick = (
                dataclasses.replace(s, seeds=args.seeds) for s in (study.full, study.quick)
            )
            study = dataclasses.replace(study, full=full, quick=quick)
        rows = measure(study, args.out / RUNS, args.quick, args.workers, until)
        print(f"{name}: {len(rows)} runs", flush=True)
        if rows:
            write(study, result_of(study, rows, args.quick), args)
    report(args.out, args.quick)


def write(study: Study, result: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write a study's result, and the pictures that need its runs' weights."""
    file = file_of(args.out, study.name)
    write_whole(file, json.dumps(result) + "\n")
    if study.picture is not None:
        found = analyse(study, read(result))
        best = {name: one.best_rate for name, one in found.results.items()}
        settings = study.size(args.quick).settings
        picture = file.with_name(f"{file.stem}_samples.png")
        study.picture(best, settings, args.out / RUNS, picture)


def report(root: Path, quick: bool) -> list[Analysis]:
    """Write page, plots and quotes from all results that there are."""
    analyses, results = [], {}
    for name in STUDIES:
        study, file = STUDIES[name].sized(quick), file_of(root, name)
        if not file.exists():
            continue
        results[name] = json.loads(file.read_text(encoding="utf-8"))
        found = analyse(study, read(results[name]))
        plot(found, file.with_suffix(".png"))
        analyses.append(found)
    write_whole(root / PAGE, page(analyses, results, waiting(results)))
    if root == ROOT:
        evidence_quotes.quote(analyses)
    for name, line in evidence(analyses).items():
        print(f"{name}: {line}")
    return analyses


def waiting(results: Mapping[str, Any]) -> list[Study]:
    """Studies of which there are no results."""
    return [study for name, study in STUDIES.items() if name not in results]


def file_of(root: Path, name: str) -> Path:
    """Where a study's result is."""
    return root / RESULTS / f"evidence_{name}.json"


def read(result: Mapping[str, Any]) -> Runs:
    """The runs of a result file."""
    return {(arm, rate, seed): metrics for arm, rate, seed, metrics in result["runs"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=STUDIES, nargs="+", help="some studies")
    parser.add_argument("--quick", action="store_true", help="a rehearsal in small")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--seeds", type=int, help="another number than the study's own")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after these")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder (default: the checkout)")
    return parser


if __name__ == "__main__":
    main()
