"""What changed between two plans: names that came or went, and rates old -> new.

Equal changes stand on one line.

Plans are compared as rows ``{name: {"lr", "weight_decay", "numel", "stack", "block", "component",
...}}``, the ``parameters`` of ``Plan.to_dict`` and of every ``plan.json``. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ModelSourceError
from dist_layerlr.files import read_config
from dist_layerlr.plan.entries import Plan, cell_name
from dist_layerlr.plan.names import natural_key

PLAN_FILE = "plan.json"
Row = Mapping[str, Any]
Rows = Mapping[str, Row]
_OPTIMIZER = "optimizer"
"""In rows of plans that name several."""
_FIELDS = frozenset({"lr", "weight_decay", "numel", "stack", "block", "component"})


def plan_diff(
    old: Plan | Rows,
    new: Plan | Rows,
    *,
    every_name: bool = False,
    called: tuple[str, str] = ("first plan", "second plan"),
) -> list[str]:
    """Readable lines for whatever trains differently; empty when both plans train alike.

    ``blocks.000-002.self_attn: lr 0.00012..0.0004 -> 0.00024..0.0008 (x2), 12 names``

    Args:
        old: a plan, or its rows.
        new: what it became.
        every_name: one line per name, instead of one per (stack, component) and equal change.
        called: what to call the two plans.
    """
    before, after = _rows(old), _rows(new)
    groups: dict[Hashable, list[str]] = {}
    for name in sorted(before.keys() | after.keys(), key=natural_key):
        a, b = before.get(name), after.get(name)
        change = _change(a, b)
        if change is not None:
            row = b or a
            assert row is not None
            groups.setdefault(
                name if every_name else (row["stack"], row["component"], change), []
            ).append(name)
    return [_line(names, before, after, called) for names in groups.values()]


def read_rows(path: str | Path) -> Rows | None:
    """Rows of a ``plan.json``, or of the folder (of a run or checkpoint) that holds one.

    None: some other JSON file.

    Raises:
        ConfigError: missing, or not JSON.
        ModelSourceError: a plan with missing or broken rows.
    """
    path = Path(path)
    file = path / PLAN_FILE if path.is_dir() else path
    loaded = read_config(file)
    if "digest" not in loaded or "parameters" not in loaded:
        return None
    rows = loaded["parameters"]
    if not isinstance(rows, dict) or not all(_is_row(row) for row in rows.values()):
        raise ModelSourceError(
            f"Invalid plan {str(file)!r}: its rows are incomplete or no numbers. Write it again"
            " with the run."
        )
    return rows


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() >= _FIELDS
        and all(isinstance(row[key], (int, float)) for key in ("lr", "numel"))
        and isinstance(row["weight_decay"], (int, float, type(None)))
    )


def _rows(plan: Plan | Rows) -> Rows:
    if not isinstance(plan, Plan):
        return plan
    rows: Rows = plan.to_dict()["parameters"]
    return rows


def _change(old: Row | None, new: Row | None) -> Hashable | None:
    """What makes two changes alike; None: no change."""
    if old is None or new is None:
        return "came" if old is None else "went"
    # Plans of older checkpoints have no row for what they did not set.
    same = all(old.get(key) == new.get(key) for key in ("lr", "weight_decay", "numel", "eps"))
    steppers = (_stepper(old), _stepper(new))
    if same and steppers[0] == steppers[1]:
        return None
    # The blocks of a component have many rates, but one ratio when the component's own rate
    # changed.
    lr: Hashable = f"{new['lr'] / old['lr']:.6g}" if old["lr"] else (old["lr"], new["lr"])
    numel = (old["numel"], new["numel"]) if old["numel"] != new["numel"] else None
    decay, eps = (tuple(row.get(key) for row in (old, new)) for key in ("weight_decay", "eps"))
    return lr, decay, eps, numel, steppers


def _line(names: Sequence[str], old: Rows, new: Rows, called: tuple[str, str]) -> str:
    before, after = [old[n] for n in names if n in old], [new[n] for n in names if n in new]
    head = names[0] if len(names) == 1 else _cells(after or before)
    if not before or not after:
        where = called[1] if after else called[0]
        parts = [f"only in the {where}, lr {_span(after or before)}"]
    else:
        parts = _changes(before, after)
    count = [f"{len(names)} names"] if len(names) > 1 else []
    return f"{head}: {', '.join(parts + count)}"


def _changes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    parts = []
    if any(a["lr"] != b["lr"] for a, b in zip(before, after, strict=True)):
        ratio = f" (x{after[0]['lr'] / before[0]['lr']:.4g})" if before[0]["lr"] else ""
        parts.append(f"lr {_span(before)} -> {_span(after)}{ratio}")
    for key, label in (("weight_decay", "weight decay"), ("eps", "eps"), ("numel", "elements")):
        old_one, new_one = before[0].get(key), after[0].get(key)
        if old_one != new_one:
            parts.append(f"{label} {_setting(old_one)} -> {_setting(new_one)}")
    old, new = _stepper(before[0]), _stepper(after[0])
    if old != new:
        parts.append(f"optimizer {old} -> {new}")
    return parts


def _stepper(row: Row) -> str:
    """Which optimizer, and whether it gets a fused matrix part by part."""
    name = row.get(_OPTIMIZER) or "the one for all"
    rows = row.get("parts") or ()
    return f"{name} on parts of {', '.join(map(str, rows))} rows" if rows else str(name)


def _cells(rows: Sequence[Row]) -> str:
    """``blocks.000-002,005.self_attn``: one stack, one component, several blocks."""
    stack, component = rows[0]["stack"], rows[0]["component"]
    blocks = sorted({row["block"] for row in rows if row["block"] is not None})
    if len(blocks) < 2:
        return cell_name((stack, rows[0]["block"], component))
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    blocks = [f"{r[0]:03d}-{r[-1]:03d}" if len(r) > 1 else f"{r[0]:03d}" for r in runs]
    return f"{stack}.{','.join(blocks)}.{component}"


def _span(rows: Sequence[Row]) -> str:
    rates = [row["lr"] for row in rows]
    low, high = min(rates), max(rates)
    return f"{low:.10g}" if low == high else f"{low:.10g}..{high:.10g}"


def _setting(value: float | None) -> str:
    return "the optimizer's" if value is None else f"{value:.6g}"
