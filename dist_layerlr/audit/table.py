"""What an audit says, as text for people and as JSON for programs. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_layerlr.audit.findings import KINDS, Finding
from dist_layerlr.audit.merge import Row, Seen

SCHEMA = 1
"""Of the JSON; a field that goes or changes its meaning raises it."""
_SHOWN = 4
_HEAD = ("name", "group", "lr", "decay", "algorithm", "weights", "state", "shards", "first step")
Cells = tuple[str, ...]


def to_dict(seen: Seen, found: Sequence[Finding], script_status: int) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "schema": SCHEMA,
        "script_status": script_status,
        "ranks": seen.ranks,
        "models": dict(seen.sharders),
        "findings": [finding.to_dict() for finding in found],
        "parameters": {
            name: {**seen.parameters.get(name, {}), **row} for name, row in seen.rows.items()
        },
        "frozen": [n for n, known in seen.parameters.items() if not known["trainable"]],
    }


def report(seen: Seen, found: Sequence[Finding], *, every_name: bool) -> str:
    """The table, and under it what is wrong."""
    models = ", ".join(f"{label} ({how})" for label, how in seen.sharders.items())
    trained = sum(1 for known in seen.parameters.values() if known["trainable"])
    head = (
        f"[audit] {models or 'no model'}, {seen.ranks} rank{'s' if seen.ranks != 1 else ''}:"
        f" {len(seen.rows)} of {trained} trainable names are in an optimizer"
    )
    lines = [head, *_columns([_HEAD, *_rows(seen, every_name)])]
    for finding in found:
        mark = "FAULT" if finding.is_fault else "warning"
        lines.append(f"[audit] {mark} ({finding.kind}): {_said(finding)}")
    if not any(finding.is_fault for finding in found):
        lines.append("[audit] no fault found")
    return "\n".join(lines)


def _said(finding: Finding) -> str:
    if finding.text:
        return finding.text
    names = finding.names
    shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
    return f"{len(names)} name{'s' if len(names) != 1 else ''} {KINDS[finding.kind]}: {shown}"


def _rows(seen: Seen, every_name: bool) -> list[Cells]:
    """One line per name, or one for all names that train alike."""
    # A model has thousands of names and a handful of ways in which they train.
    alike: dict[Any, list[str]] = {}
    for name, row in seen.rows.items():
        cells = _cells(row, seen.ranks)
        alike.setdefault(name if every_name else cells, []).append(name)
    lines: list[Cells] = []
    for names in alike.values():
        more = f" +{len(names) - 1}" if len(names) > 1 else ""
        lines.append((names[0] + more, *_cells(seen.rows[names[0]], seen.ranks)))
    return lines


def _cells(row: Row, ranks: int) -> Cells:
    state = ",".join(sorted(set((row.get("state") or {}).values()))) or "-"
    # A rate can be observed for optimizers whose formula is known; movement always.
    if "observed" in row:
        effect = "as its lr" if row.get("obeys", True) else f"at {row['observed']:.4g}"
    else:
        effect = "moved" if row["moved"] else "still"
    return (
        str(row["group"]),
        f"{row['lr']:.6g}",
        f"{row['weight_decay']:g}",
        row["algorithm"],
        row.get("master", "-"),
        state,
        _held_by(row, ranks),
        effect,
    )


def _held_by(row: Row, ranks: int) -> str:
    """Who steps it: each rank all of it, or some of them a part each."""
    # Under FSDP of several groups (HSDP) a part may have copies, fewer than there are ranks.
    if row["replicas"] >= ranks:
        return "whole"
    holders = row["holders"]
    return f"on {holders} rank{'s' if holders != 1 else ''}"


def _columns(rows: Sequence[Cells]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
