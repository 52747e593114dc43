"""A plan, and what its run measured, as one HTML page that loads nothing from elsewhere.

The page is drawn by its own script from numbers that stand in it; the template lies in ``assets/``.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_json, write_text
from dist_layerlr.plan.diff import PLAN_FILE, Rows, read_rows
from dist_layerlr.plan.entries import Plan, cell_name
from dist_layerlr.report.drawing import OUTSIDE, place_of
from dist_layerlr.report.grid import format_lr

FRAMES, POINTS, PICTURES = 60, 1000, 8
"""Most steps of the slider, points of a curve, and pictures: the page stays small."""
_OF_RUNS = ("names", "frames", "loss", "held", "rates", "speed", "samples", "tables")


def write_page(path: Path, source: Plan | Path, title: str) -> None:
    """Write the page.

    Args:
        path: Ends in .html.
        source: A plan, or the folder of a run.
        title: Of the page.

    Raises:
        ConfigError: the folder holds no plan, or the file cannot be written.
    """
    if path.suffix != ".html":
        raise ConfigError(f"Invalid page {str(path)!r}: must end in .html.")
    if isinstance(source, Plan):
        content = page(plan_data(source), title)
    else:
        content = page({**plan_data(run_rows(source)), **run_data(source, source)}, title)
    try:
        write_text(path, content)
    except OSError as error:
        raise ConfigError(f"Cannot write page {str(path)!r}: {error.strerror}.") from None


def page(data: Mapping[str, Any], title: str) -> str:
    """Put data into the template."""
    # A plan alone has none of what a run adds.
    none: dict[str, Any] = {key: [] for key in _OF_RUNS}
    text = json.dumps({"summary": "", **none, **data}, allow_nan=False)
    parts = {
        "css": _asset("page.css"),
        "script": _asset("page.js"),
        "title": html.escape(title),
        # Of "<" a browser would make tags, and the end of the script that holds the data.
        "data": text.replace("<", "\\u003c"),
    }
    # One pass: what is put in is not searched for marks.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (files("dist_layerlr.report") / "assets" / name).read_text(encoding="utf-8")


def run_rows(folder: Path) -> Rows:
    """Rows of a run's plan.

    Raises:
        ConfigError: there is none.
    """
    rows = read_rows(folder) if (folder / PLAN_FILE).is_file() else None
    if rows is None:
        raise ConfigError(f"{str(folder)!r} holds no {PLAN_FILE}: give the folder of a run.")
    return rows


def plan_data(source: Plan | Rows) -> dict[str, Any]:
    """The learning-rate map: panels of cells, each with what is said when it is pointed at."""
    rows = _rows_of(source) if isinstance(source, Plan) else source
    panels: dict[str, dict[str, list[tuple[str, Mapping[str, Any]]]]] = {}
    for name, row in rows.items():
        cell = cell_name((row["stack"], row["block"], row["component"]))
        panel = row.get("panel") or row["stack"] or OUTSIDE
        panels.setdefault(panel, {}).setdefault(cell, []).append((name, row))
    ordered = sorted(panels, key=lambda title: title == OUTSIDE)
    elements = f"{sum(row['numel'] for row in rows.values()):,}"
    rates = len({row["lr"] for row in rows.values()})
    return {
        "summary": f"{len(rows):,} parameters, {elements} elements at {rates} learning rates",
        "panels": [_panel(title, panels[title]) for title in ordered],
    }


def _rows_of(plan: Plan) -> Rows:
    """The rows of plan.json, and what led to them."""
    found = {}
    for name, row in plan.to_dict()["parameters"].items():
        entry = plan.entries[name]
        found[name] = {**row, "panel": entry.panel, "rule": entry.rule, "base_lr": entry.base_lr}
        found[name] |= {"multiplier": entry.multiplier, "lora_plus": entry.lora_plus}
    return found


def _panel(title: str, cells: Mapping[str, list[tuple[str, Mapping[str, Any]]]]) -> dict[str, Any]:
    drawn = []
    for name, members in cells.items():
        first = members[0][1]
        numel = sum(row["numel"] for _, row in members)
        mean = sum(row["lr"] * row["numel"] for _, row in members) / (numel or 1)
        cell = {"name": name, "component": first["component"], "block": first["block"] or 0}
        drawn.append({**cell, "lr": mean, "params": len(members), "numel": numel})
        drawn[-1]["lines"] = _lines(members)
    components = sorted({cell["component"] for cell in drawn}, key=place_of)
    blocks = max(cell["block"] for cell in drawn) + 1
    shape = {"title": title, "outside": title == OUTSIDE, "components": components}
    return {**shape, "blocks": blocks, "cells": drawn}


def _lines(members: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Every way in which a cell's parameters came to their rates, with a name for each."""
    ways: dict[tuple[Any, ...], list[str]] = {}
    for name, row in members:
        depth = row.get("factor")
        # A plan need not say how its rates came about.
        led = "" if depth is None else f" = depth factor {depth:.4g}"
        factors = [f"lr {format_lr(row['lr'])}{led}"]
        for key, word in (("base_lr", "base"), ("multiplier", "region"), ("lora_plus", "LoRA+")):
            if key in row and (key == "base_lr" or row[key] != 1):
                factors.append(f"{word} {row[key]:g}")
        decay = "the optimizer's" if row["weight_decay"] is None else f"{row['weight_decay']:g}"
        way = " x ".join(factors), f"weight decay {decay}", row.get("rule", "")
        ways.setdefault(way, []).append(name)
    found: list[str] = []
    for (rate, decay, rule), names in list(ways.items())[:4]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found += ["", f"{names[0]}{more}", rate, decay, *([f"rule: {rule}"] if rule else [])]
    return found + ([f"... and {len(ways) - 4} other ways"] if len(ways) > 4 else [])


def run_data(folder: Path, own: Path) -> dict[str, Any]:
    """What a run left in its folder, as far as it is there and whole.

    Args:
        folder: Of the run.
        own: Of the network: the same, or the one of its sub-folders that is named after it.
    """
    network = own.name if own != folder else None
    all_rows = read_metrics(folder / "metrics.jsonl")
    all_rows = [row for row in all_rows if row.get("network") == network]
    rows = [row for row in all_rows if "loss" in row]
    held = [row for row in all_rows if "val_loss" in row]
    measured = [row for row in rows if "cells" in row]
    names = list(measured[0]["cells"]) if measured else []
    frames = [_frame(row, names) for row in _thinned(measured, FRAMES)]
    some = _thinned(rows, POINTS)
    starts = _json(folder / "run.json")
    return {
        "names": names,
        "frames": frames,
        "loss": [[row["step"], row["loss"]] for row in some],
        "held": [[row["step"], row["val_loss"]] for row in _thinned(held, POINTS)],
        "speed": [[row["step"], row.get("samples_per_s")] for row in some],
        "rates": _rates(run_rows(own), some),
        "samples": _samples(folder / "samples"),
        "tables": [*_proofs(own), *_tables(rows, starts)],
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; half a row, which a killed run may leave, is none."""
    found: list[dict[str, Any]] = []
    # Bytes that are no text, which a full disk leaves, spoil their own line alone.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            # A page's JSON has no NaN: a browser would refuse all of it.
            row = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            continue
        if isinstance(row, dict) and _is_step(row):
            found.append(row)
    return found


def _is_step(row: Mapping[str, Any]) -> bool:
    cells = row.get("cells", {})
    known = isinstance(cells, dict) and all(isinstance(cell, list) for cell in cells.values())
    return ("loss" in row or "val_loss" in row) and isinstance(row.get("step"), int) and known


def _frame(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A measured step: its cells in the order of ``names``, which the page holds once."""
    cells: list[list[float | None]] = []
    for name in names:
        known: list[float | None] = row["cells"].get(name, [])
        # Three digits are more than a colour shows.
        cells.append([None if value is None else float(f"{value:.3g}") for value in known])
    return {"step": row["step"], "cells": cells}


def _thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most ``most`` rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return rows
    return [rows[place * (len(rows) - 1) // (most - 1)] for place in range(most)]


def _rates(plan: Rows, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rate of each component over time: that of its middle parameter, times the schedule."""
    known: dict[str, list[float]] = {}
    for row in plan.values():
        known.setdefault(row["component"], []).append(row["lr"])
    series = []
    for component in sorted(known, key=place_of):
        middle = sorted(known[component])[len(known[component]) // 2]
        points = [[row["step"], middle * row.get("lr_factor", 1.0)] for row in rows]
        series.append({"name": component, "points": points})
    return series


def _samples(folder: Path) -> list[dict[str, str]]:
    pictures = [{"path": path} for path in sorted(folder.glob("step_*.png"))]
    pictures += [{"path": path} for path in folder.glob("samples.png")]
    found = []
    for picture in _thinned(pictures, PICTURES):
        code = base64.b64encode(picture["path"].read_bytes()).decode()
        name = picture["path"].stem
        found.append({"name": name, "uri": f"data:image/png;base64,{code}"})
    return found


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of a run; empty where it is missing or damaged."""
    try:
        return read_json(path)
    except ConfigError:
        return {}


Table = tuple[str, str, list[str] | None, list[list[str]]]
"""(title, note, head, rows)."""


def _proofs(folder: Path) -> list[Table]:
    """What verify.json says, at the start and at the end."""
    found: list[Table] = []
    proof = _json(folder / "verify.json")
    for when in ("start", "end"):
        if isinstance(proof.get(when), dict):
            note = f"Of the live optimizer on every rank, at the {when}."
            found.append((f"Proof, {when}", note, None, _pairs(_flat(proof[when]))))
    return found


def _tables(rows: list[dict[str, Any]], record: Mapping[str, Any]) -> list[Table]:
    """How the run came about."""
    listed = record.get("starts")
    starts = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    now = starts[-1] if starts else {}
    last = starts[-2].get("config") if len(starts) > 1 else record.get("previous")
    config, old = _flat(now.get("config")), _flat(last)
    changed = sorted(key for key in config.keys() | old.keys() if config.get(key) != old.get(key))
    found: list[Table] = []
    if old:
        diff = [[key, old.get(key, "-"), config.get(key, "-")] for key in changed]
        note = "Nothing changed." if not diff else ""
        found.append(("Changed since the last run", note, ["field", "last", "now"], diff))
    if config:
        found.append(("Config", "With every default filled in.", None, _pairs(config)))
    machine = {key: value for key, value in now.items() if key not in ("config", "versions")}
    if rows:
        machine["peak memory, GiB"] = max(row.get("peak_memory_gb", 0.0) for row in rows)
        machine["steps"] = rows[-1]["step"] + 1
    shown = {**_flat(machine), **_flat(now.get("versions"), "version ")}
    if shown:
        found.append(("Machine and versions", "", None, _pairs(shown)))
    return found


def _pairs(values: Mapping[str, str]) -> list[list[str]]:
    return [[key, value] for key, value in values.items()]


def _flat(config: Any, before: str = "") -> dict[str, str]:
    """``{"train.steps": "10"}``; nothing where a damaged file has no mapping."""
    found: dict[str, str] = {}
    if not isinstance(config, Mapping):
        return found
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[before + key] = value if isinstance(value, str) else json.dumps(value)
    return found
