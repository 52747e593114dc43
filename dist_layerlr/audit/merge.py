"""The files that ranks have written, as one picture of what trained. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from dist_layerlr.files import read_json
from dist_layerlr.plan.entries import ParamInfo

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One script, as all of its ranks saw it."""

    ranks: int
    sharders: Mapping[str, str]
    """{label of a model: how it is wrapped}."""
    parameters: Mapping[str, Row]
    """{name: shape, trainable, class}, of every model."""
    rows: Mapping[str, Row]
    """{name: how it is trained}, of what any optimizer holds."""
    waiting: frozenset[str] = frozenset()
    """Names held by an optimizer that was not stepped."""
    problems: tuple[tuple[str, str], ...] = ()
    """(kind, text), found by the ranks themselves."""
    apart: tuple[str, ...] = ()
    """Names whose settings differ between ranks."""
    faults: tuple[str, ...] = field(default=())
    """Last lines of the tracebacks of the audit itself."""

    def infos(self) -> list[ParamInfo]:
        """What a plan is made from."""
        return [
            ParamInfo(
                name=name,
                shape=tuple(row["shape"]),
                trainable=row["trainable"],
                owner_class=row["class"],
            )
            for name, row in self.parameters.items()
        ]


def read_reports(folder: Path) -> Seen | None:
    """Merge what the ranks have written. None: no step of any optimizer was seen."""
    reports: dict[int, Row] = {}
    # A restarted job has written once per attempt: the last one counts.
    files = sorted(folder.glob("rank*.json"), key=lambda file: file.stat().st_mtime)
    for file in files:
        report = read_json(file)
        reports[report["rank"]] = report
    faults = [
        file.read_text(encoding="utf-8").strip().splitlines()[-1]
        for file in sorted(folder.glob("fault-*.txt"))
    ]
    if not reports:
        return None if not faults else nothing(tuple(faults))
    return _merged([reports[rank] for rank in sorted(reports)], tuple(dict.fromkeys(faults)))


def nothing(faults: tuple[str, ...] = ()) -> Seen:
    """What is known where no rank has written anything."""
    return Seen(ranks=0, sharders={}, parameters={}, rows={}, faults=faults)


def _merged(reports: list[Row], faults: tuple[str, ...]) -> Seen:
    several = len({label for report in reports for label in report["models"]}) > 1
    sharders: dict[str, str] = {}
    parameters: dict[str, Row] = {}
    rows: dict[str, Row] = {}
    waiting: set[str] = set()
    problems: dict[tuple[str, str], None] = {}
    apart: dict[str, None] = {}
    for report in reports:
        for label, model in report["models"].items():
            # Names of one model are its own; of two, they may be the same ones.
            prefix = f"{label}." if several else ""
            sharders[label] = model["sharder"]
            # Shapes are the whole ones on every rank; the first that tells them is believed.
            for name, known in model["parameters"].items():
                parameters.setdefault(prefix + name, known)
            waiting.update(prefix + name for name in model.get("waiting", ()))
            for name, row in report["names"].get(label, {}).items():
                if not _add(rows, prefix + name, row):
                    apart[prefix + name] = None
        problems |= dict.fromkeys((kind, text) for kind, text in report["problems"])
    return Seen(
        ranks=max(report["ranks"] for report in reports),
        sharders=sharders,
        parameters=parameters,
        rows=rows,
        waiting=frozenset(waiting),
        problems=tuple(problems),
        apart=tuple(apart),
        faults=faults,
    )


def _add(rows: dict[str, Row], name: str, row: Row) -> bool:
    """Add what one rank saw of a name. False: the ranks before it saw other settings."""
    # Copies on several ranks are the same elements: together they count once.
    share = row["elements"] / row["replicas"]
    known = rows.get(name)
    if known is None:
        rows[name] = {**row, "elements": share, "holders": int(share > 0)}
        return True
    known["elements"] += share
    known["holders"] += int(share > 0)
    # An empty shard never moves and has no state: any rank's word is enough.
    for key in ("moved", "gradient", "twice"):
        known[key] = known[key] or row[key]
    known["obeys"] = known.get("obeys", True) and row.get("obeys", True)
    # The rank that holds nothing of a name has observed nothing of it.
    if "observed" not in known and "observed" in row:
        known["observed"] = row["observed"]
    for key in ("master", "state"):
        known[key] = known.get(key) or row.get(key)
    known["optimizers"] = sorted({*known["optimizers"], *row["optimizers"]})
    return all(known[key] == row[key] for key in ("lr", "weight_decay", "algorithm"))


def whole(seen: Seen, name: str) -> int | None:
    """Elements of a name; None where its true shape is unknown."""
    known = seen.parameters.get(name)
    return None if known is None else prod(known["shape"])
