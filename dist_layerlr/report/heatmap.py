"""The plan as a picture: blocks across, components down, a panel per stack.

Colour is the learning rate, on a log scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr.plan.entries import Plan, PlanEntry, total_numel
from dist_layerlr.report.drawing import (
    HELD,
    OUTSIDE,
    Key,
    add_bar,
    check_picture,
    log_norm,
    new_figure,
    panels,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_grid(plan: Plan, path: Path) -> None:
    """Write the heat map of a plan as a PNG, 1200 pixels wide.

    Cells with learning rate 0 or without parameters stay grey. A cell's value is the mean over its
    elements.

    Raises:
        ConfigError: matplotlib is not installed, or the file is no .png or cannot be written.
    """
    check_picture(path)
    grids: dict[str, Cells] = {}
    rates: list[float] = []
    for title, rows in panels(plan).items():
        grids[title] = {key: _mean_lr(entries) for key, entries in rows.items()}
        rates += grids[title].values()
    norm = log_norm(rates)
    heights = [max(1.6, 0.42 * len({c for c, _ in cells}) + 0.9) for cells in grids.values()]
    figure = new_figure(sum(heights) + 1.1)
    axes = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, cells) in zip(axes, grids.items(), strict=True):
        _draw_panel(axis, title, cells, norm)
    block = plan.config.per_layer_lr
    strategy = (
        f"{block.depth.depth_strategy}, min_depth_factor {block.depth.floor:g}"
        if block.enabled
        else "flat"
    )
    figure.suptitle(f"Learning rates of {plan.config.model_type} ({strategy})", fontsize=14)
    add_bar(figure, axes, norm)
    save(figure, path)


Cells = dict[Key, float]
"""{(component, block): mean lr}."""


def _mean_lr(rows: Sequence[PlanEntry]) -> float:
    return sum(e.lr * e.numel for e in rows) / (total_numel(rows) or 1)


def _draw_panel(axis: Axes, title: str, cells: Cells, norm: Any) -> None:
    components = list(dict.fromkeys(component for component, _ in cells))
    blocks = max(b for _, b in cells) + 1
    # A log scale has no place for 0; what is NaN shows the axis behind it, in grey.
    values = [[cells.get((c, b), 0.0) or float("nan") for b in range(blocks)] for c in components]
    axis.set_facecolor(HELD)
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
