"""The plan as a picture: blocks across, components down, a panel per stack.

Colour is the learning rate, on a log scale.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.components import COMPONENTS
from dist_layerlr.plan.entries import Plan, PlanEntry, total_numel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTSIDE = "outside blocks"
DPI = 100
WIDTH_PX = 1200


def draw_grid(plan: Plan, path: Path) -> None:
    """Write the heat map of a plan as a PNG, 1200 pixels wide.

    Cells with learning rate 0 or without parameters stay grey. A cell's value is the mean over its
    elements.

    Raises:
        ConfigError: matplotlib is not installed, or the file is no .png or cannot be written.
    """
    if path.suffix != ".png":
        raise ConfigError(f"Invalid picture file {str(path)!r}: must end in .png.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("Drawing needs matplotlib: pip install 'dist_layerlr[plot]'.") from None
    panels = _panels(plan)
    rates = [lr for rows in panels.values() for lr in rows.values() if lr > 0] or [1.0]
    low, high = min(rates), max(rates)
    # Room at both ends: equal rates would be a range without a width, which no bar can show.
    norm = LogNorm(low / 1.01, high * 1.01)
    heights = [max(1.6, 0.42 * len({c for c, _ in cells}) + 0.9) for cells in panels.values()]
    figure = Figure(figsize=(WIDTH_PX / DPI, sum(heights) + 1.1), dpi=DPI, layout="constrained")
    # Not by pyplot, which keeps every figure it makes and may look for a display.
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, cells) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, title, cells, norm)
    block = plan.config.per_layer_lr
    strategy = (
        f"{block.depth.depth_strategy}, min_depth_factor {block.depth.floor:g}"
        if block.enabled
        else "flat"
    )
    figure.suptitle(f"Learning rates of {plan.config.model_type} ({strategy})", fontsize=14)
    bar = figure.colorbar(
        _scalar_map(norm), ax=list(axes), label="learning rate", fraction=0.03, pad=0.01
    )
    _label_bar(bar, low, high)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"Cannot write picture {str(path)!r}: {error.strerror}.") from None


Cells = dict[tuple[str, int], float]
"""{(component, block): mean lr}."""


def _panels(plan: Plan) -> dict[str, Cells]:
    grouped: dict[str, dict[tuple[str, int], list[PlanEntry]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for entry in plan.entries.values():
        grouped[entry.panel or OUTSIDE][entry.component, entry.block or 0].append(entry)
    if OUTSIDE in grouped:
        grouped[OUTSIDE] = grouped.pop(OUTSIDE)  # the last panel
    return {
        title: {key: _mean_lr(rows) for key, rows in cells.items()}
        for title, cells in grouped.items()
    }


def _mean_lr(rows: list[PlanEntry]) -> float:
    return sum(e.lr * e.numel for e in rows) / (total_numel(rows) or 1)


def _draw_panel(axis: Axes, title: str, cells: Cells, norm: Any) -> None:
    known = [*COMPONENTS, "fused", "modulation", "conv", "embed", "head"]
    components = sorted(
        {c for c, _ in cells}, key=lambda c: (known.index(c) if c in known else 99, c)
    )
    blocks = max(b for _, b in cells) + 1
    # A log scale has no place for 0; what is NaN shows the axis behind it, in grey.
    values = [[cells.get((c, b), 0.0) or float("nan") for b in range(blocks)] for c in components]
    axis.set_facecolor("0.88")
    axis.imshow(values, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
    axis.set_yticks(range(len(components)), components)
    axis.set_title(title, loc="left", fontsize=11)
    if title == OUTSIDE:
        axis.set_xticks([])
    else:
        step = max(1, -(-blocks // 20))
        axis.set_xticks(range(0, blocks, step))
        axis.set_xlabel("block")
    if blocks <= 12:
        _write_values(axis, values, norm)


def _write_values(axis: Axes, values: list[list[float]], norm: Any) -> None:
    for y, row in enumerate(values):
        for x, lr in enumerate(row):
            # Only NaN, an empty cell, differs from itself.
            if lr == lr:
                # The upper end of viridis is yellow, on which white cannot be read.
                colour = "black" if norm(lr) > 0.6 else "white"
                axis.text(x, y, f"{lr:.2e}", ha="center", va="center", color=colour, fontsize=8)


def _scalar_map(norm: Any) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(norm=norm, cmap="viridis")


def _label_bar(bar: Any, low: float, high: float) -> None:
    """A range inside one decade has no major log tick of its own, so five even ones are set."""
    ticks = [low * (high / low) ** (i / 4) for i in range(5)] if high > low else [low]
    bar.set_ticks(ticks, labels=[f"{t:.1e}" for t in ticks])
    bar.minorticks_off()
