"""What the streaming benchmark says of its rows: table lines, verdicts and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streaming_setup import Bench

Row = dict[str, Any]
TOLERANCE = 0.2
"""Relative, of the fastest step. Without overlap a step is 1.4 to 1.6 times as long. A CPU that
computes does not run ahead and ask for copies, so they start up to two blocks late."""

COLUMNS = {
    "tokens": 7,
    "step ms": 10,
    "predicted": 11,
    "ratio": 7,
    "compute": 9,
    "link": 9,
    "stalls": 8,
    "GB": 6,
}
HEADER = f"{'arm':<30}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def line_of(row: Row) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['arm']:<30}{row['tokens']:>7}  {row['error'][:80]}"
    text = f"{row['arm']:<30}{row['tokens']:>7}{row['min_s'] * 1e3:>10.1f}"
    if "predicted_s" in row:
        text += f"{row['predicted_s'] * 1e3:>11.1f}{row['min_s'] / row['predicted_s']:>7.2f}"
    if "compute_s" in row:
        text += (
            f"{row['compute_s'] * 1e3:>9.1f}{row['transfer_s'] * 1e3:>9.1f}{row['stalls']:>8.1f}"
        )
        text += f"{row['peak_gb']:>6.1f}" if row["peak_gb"] is not None else ""
    return text + (
        "" if row.get("loss_equal", True) else "   losses differ from the resident run's"
    )


Verdict = tuple[bool, str]
"""(whether it holds, what must hold and how it went)."""


def verdicts(bench: Bench, rows: list[Row]) -> list[Verdict]:
    """What must hold: equal losses, on the CPU predicted times, on CUDA speed beside the others."""
    streamed = [r for r in rows if "predicted_fetches" in r and r["exact"] == bench.exact]
    if bench.cuda and not bench.exact:
        return _verdicts_on_speed(bench, rows, streamed)
    same = [r for r in streamed if r["loss_equal"]]
    text = f"losses bitwise equal to the resident run in {len(same)} of {len(streamed)} rows"
    found = [(same == streamed, text)]
    return found if bench.cuda else [*found, *_verdicts_on_prediction(rows, streamed)]


def _verdicts_on_prediction(rows: list[Row], streamed: list[Row]) -> list[Verdict]:
    off = [r["min_s"] / r["predicted_s"] - 1 for r in rows if "predicted_s" in r]
    near = [abs(x) <= TOLERANCE for x in off]
    counted = [r["fetches"] == r["predicted_fetches"] for r in streamed]
    copies = f"as many copies as predicted in {sum(counted)} of {len(counted)} rows"
    times = (
        f"step within {TOLERANCE:.0%} of the prediction in {sum(near)} of {len(near)} rows (off by"
        f" {_span(off, '+')})"
    )
    return [(all(counted), copies), (all(near), times)]


def _verdicts_on_speed(bench: Bench, rows: list[Row], streamed: list[Row]) -> list[Verdict]:
    # Arms with resident blocks or without overlap have a comma in their label: they are no
    # measure of what the plain stream can do.
    plain = [r for r in streamed if r["arm"].startswith("ours W=") and "," not in r["arm"]]
    resident: dict[int, float] = {}
    best: dict[int, float] = {}
    for row in rows:
        if row["arm"] == "resident" and "median_s" in row:
            resident[row["tokens"]] = row["median_s"]
    for row in plain:
        best[row["tokens"]] = min(row["median_s"], best.get(row["tokens"], row["median_s"]))
    slow, full, beaten = [], [], []
    for row in plain:
        # Between the two bounds neither the link nor compute is clearly the longer one.
        if row["hidden"] and row["compute_s"] >= 1.5 * row["transfer_s"]:
            slow.append(row["median_s"] / resident[row["tokens"]] - 1)
        if row["transfer_s"] >= 1.5 * row["compute_s"]:
            full.append(row["gb_s"] / bench.machine.gb_s)
    for row in rows:
        is_other = row["arm"] != "resident" and not row["arm"].startswith("ours")
        if is_other and "min_s" in row and row["tokens"] in best:
            beaten.append(best[row["tokens"]] <= row["median_s"])
    hidden = "slower than resident by at most 3% where the link is hidden"
    peak = "at least 90% of the link's peak where it is not"
    return [
        (all(x <= 0.03 for x in slow), f"{hidden}: {_span(slow)}"),
        (all(x >= 0.9 for x in full), f"{peak}: {_span(full)}"),
        (all(beaten), f"faster than every other way in {sum(beaten)} of {len(beaten)} rows"),
    ]


def _span(values: list[float], sign: str = "") -> str:
    return f"{min(values):{sign}.1%} to {max(values):{sign}.1%}" if values else "no such row"


def draw(bench: Bench, rows: list[Row], path: Path) -> None:
    """Step time over tokens, one line per arm, and the floor of ours with one unit ahead."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(8, 5))
    good = sorted(
        (r for r in rows if "min_s" in r and r["exact"] == bench.exact), key=lambda r: r["tokens"]
    )
    for label in dict.fromkeys(
        r["arm"] for r in sorted(good, key=lambda r: r["arm"] != "resident")
    ):
        line = [r for r in good if r["arm"] == label]
        axes.plot(
            [r["tokens"] for r in line],
            [r["median_s"] for r in line],
            marker="o",
            markersize=4,
            label=label,
        )
    floor = [r for r in good if r["arm"] == "ours W=1" and "compute_s" in r]
    axes.plot(
        [r["tokens"] for r in floor],
        [max(r["compute_s"], r["transfer_s"]) for r in floor],
        "k--",
        linewidth=1,
        label="max(compute, bytes / bandwidth)",
    )
    axes.set(xscale="log", yscale="log", xlabel="tokens per step", ylabel="seconds per step")
    axes.set_title(
        f"{bench.size.blocks} blocks of width {bench.size.width}, LoRA; link"
        f" {bench.machine.gb_s:.3g} GB/s"
    )
    axes.set_xticks(bench.tokens, [f"{t:,}" for t in bench.tokens])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
