"""The plan over time as a picture: steps across, blocks of each component down, a panel per stack.

Colour is the learning rate before the run's schedule, on a log scale; what is held is grey. A ramp
below the lowest planned rate has the colour of that rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr import fields
from dist_layerlr.plan.entries import Plan, PlanEntry
from dist_layerlr.report.drawing import (
    HELD,
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

COLUMNS = 400
"""Steps that are drawn, at most: about what the picture has room for."""
_HIGH, _LOW = 0.3, 0.045
"""Inches of a row alone in its component, and of each further block's."""


def draw_over_time(plan: Plan, path: Path, steps: int) -> None:
    """Write the rates of a plan over a run as a PNG, 1200 pixels wide.

    A row is a block of a component: the mean over its elements. Rates that rest stay one colour.

    Args:
        plan: of a model; its timings say what changes.
        path: of the picture.
        steps: optimizer steps of the run.

    Raises:
        ConfigError: matplotlib is not installed, a number of steps that cannot be, or the file is
            no .png or cannot be written.
    """
    check_picture(path)
    fields.integer(1)("steps", steps)
    stacks, shown = panels(plan), columns(steps)
    # Not the rates of ramps, which begin near 0: they would leave the others one colour.
    norm = log_norm(entry.lr for entry in plan.entries.values())
    heights = [_height(rows) for rows in stacks.values()]
    figure = new_figure(sum(heights) + 1.0)
    axes = figure.subplots(len(stacks), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, stacks.items(), strict=True):
        table = [_rates(entries, shown) for entries in rows.values()]
        _draw_panel(axis, title, list(rows), table, norm, steps)
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle(
        f"Learning rates of {plan.config.model_type} over {steps} steps, before the run's schedule",
        fontsize=13,
    )
    add_bar(figure, axes, norm)
    save(figure, path)


def columns(steps: int) -> list[int]:
    """The steps that are drawn: all of a short run, evenly chosen ones of a long one."""
    if steps <= COLUMNS:
        return list(range(steps))
    return [column * steps // COLUMNS for column in range(COLUMNS)]


def _rates(entries: Sequence[PlanEntry], steps: Sequence[int]) -> list[float]:
    """The mean rate of some parameters at each step."""
    # Parameters of one timing and rate are asked once: a fold of a large model has thousands.
    weights: dict[Any, tuple[PlanEntry, int]] = {}
    for entry in entries:
        key = (entry.lr, entry.timing)
        weights[key] = (entry, weights.get(key, (entry, 0))[1] + entry.numel)
    total = sum(numel for _, numel in weights.values()) or 1
    return [sum(e.lr_at(step) * n for e, n in weights.values()) / total for step in steps]


def _height(rows: dict[Key, list[PlanEntry]]) -> float:
    """Inches of a panel."""
    components = len({component for component, _ in rows})
    return 0.7 + _HIGH * components + _LOW * (len(rows) - components)


def _draw_panel(
    axis: Axes,
    title: str,
    keys: Sequence[Key],
    table: Sequence[Sequence[float]],
    norm: Any,
    steps: int,
) -> None:
    """Draw one stack; components are told apart by lines, and named in their middle."""
    heights: dict[str, int] = {}
    edges = [0.0]
    places: dict[str, float] = {}
    for component, _ in keys:
        heights[component] = heights.get(component, 0) + 1
    for component, blocks in heights.items():
        row = (_HIGH + _LOW * (blocks - 1)) / blocks
        places[component] = edges[-1] + row * blocks / 2
        edges += [edges[-1] + row * (number + 1) for number in range(blocks)]
    across = [*columns(steps), steps]
    # A log scale has no place for 0; what is NaN shows the axis behind it, in grey.
    values = [[lr or float("nan") for lr in row] for row in table]
    axis.set_facecolor(HELD)
    axis.pcolormesh(across, edges, values, norm=norm, cmap="viridis")
    axis.set_ylim(edges[-1], 0.0)
    axis.set_xlim(0, steps)
    axis.set_yticks(list(places.values()), list(places))
    axis.tick_params(axis="y", length=0)
    last = 0.0
    for blocks in heights.values():
        last += _HIGH + _LOW * (blocks - 1)
        axis.axhline(last, color="white", linewidth=1.5)
    blocks = max(heights.values())
    name = title if blocks == 1 else f"{title}: {blocks} blocks, the first on top"
    axis.set_title(name, loc="left", fontsize=11)
