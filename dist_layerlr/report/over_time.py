"""The plan over time as a picture: steps across, blocks of each component down, a panel per stack.

Colour is the learning rate before the run's schedule, on a log scale; what is held is grey. A ramp
below the lowest planned rate has the colour of that rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.components import COMPONENTS
from dist_layerlr.plan.entries import Plan, PlanEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUTSIDE = "outside blocks"
DPI = 100
WIDTH_PX = 1200
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
    if path.suffix != ".png":
        raise ConfigError(f"Invalid picture file {str(path)!r}: must end in .png.")
    fields.integer(1)("steps", steps)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("Drawing needs matplotlib: pip install 'dist_layerlr[plot]'.") from None
    panels, shown = _panels(plan), columns(steps)
    rates: set[float] = set()
    for entry in plan.entries.values():
        rates.add(entry.lr)
    # Not those of ramps, which begin near 0: they would leave the others one colour. A log scale
    # has no place for what is held.
    rates = (rates - {0.0}) or {1.0}
    # Room at both ends: equal rates would be a range without a width, which no bar can show.
    norm = LogNorm(min(rates) / 1.01, max(rates) * 1.01)
    heights = [_height(rows) for rows in panels.values()]
    size = (WIDTH_PX / DPI, sum(heights) + 1.0)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    # Not by pyplot, which keeps every figure it makes and may look for a display.
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        table = [_rates(entries, shown) for entries in rows.values()]
        _draw_panel(axis, title, list(rows), table, norm, steps)
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle(
        f"Learning rates of {plan.config.model_type} over {steps} steps, before the run's schedule",
        fontsize=13,
    )
    _add_bar(figure, list(axes), norm)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"Cannot write picture {str(path)!r}: {error.strerror}.") from None


def columns(steps: int) -> list[int]:
    """The steps that are drawn: all of a short run, evenly chosen ones of a long one."""
    if steps <= COLUMNS:
        return list(range(steps))
    return [column * steps // COLUMNS for column in range(COLUMNS)]


Key = tuple[str, int]
"""(component, block)."""


def _panels(plan: Plan) -> dict[str, dict[Key, list[PlanEntry]]]:
    """{panel: {(component, block): its parameters}}, components in their usual order."""
    found: dict[str, dict[Key, list[PlanEntry]]] = {}
    for entry in plan.entries.values():
        rows = found.setdefault(entry.panel or OUTSIDE, {})
        rows.setdefault((entry.component, entry.block or 0), []).append(entry)
    if OUTSIDE in found:
        found[OUTSIDE] = found.pop(OUTSIDE)  # the last panel
    known = [*COMPONENTS]

    def place(key: Key) -> tuple[int, str, int]:
        return (known.index(key[0]) if key[0] in known else len(known), *key)

    for title, rows in found.items():
        found[title] = {key: rows[key] for key in sorted(rows, key=place)}
    return found


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
    axis.set_facecolor("0.88")
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


def _add_bar(figure: Any, axes: list[Any], norm: Any) -> None:
    """Five even labels: a range inside one decade has no major log tick of its own."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(
        ScalarMappable(norm=norm, cmap="viridis"),
        ax=axes,
        label="learning rate",
        fraction=0.03,
        pad=0.01,
    )
    low, high = norm.vmin * 1.01, norm.vmax / 1.01
    ticks = [low * (high / low) ** (i / 4) for i in range(5)] if high > low * 1.001 else [low]
    bar.set_ticks(ticks, labels=[f"{tick:.1e}" for tick in ticks])
    bar.minorticks_off()
