"""What the pictures share: a figure that needs no display, its file, the colours of rates."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan.components import COMPONENTS
from dist_layerlr.plan.entries import Plan, PlanEntry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
WIDTH_PX = 1200
OUTSIDE = "outside blocks"
HELD = "0.88"
"""Grey, behind what has no rate: a log scale has no place for 0."""
_ORDER = (*COMPONENTS, "fused", "modulation", "conv", "embed", "head")
Key = tuple[str, int]
"""(component, block)."""


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn, before there is work in it.

    Raises:
        ConfigError: matplotlib is not installed, or the file is no .png.
    """
    if path.suffix != ".png":
        raise ConfigError(f"Invalid picture file {str(path)!r}: must end in .png.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("Drawing needs matplotlib: pip install 'dist_layerlr[plot]'.") from None


def new_figure(height: float) -> Figure:
    """A figure of 1200 pixels across and so many inches of 100 pixels down."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / DPI, height), dpi=DPI, layout="constrained")
    # Not by pyplot, which keeps every figure it makes and may look for a display.
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"Cannot write picture {str(path)!r}: {error.strerror}.") from None


def panels(plan: Plan) -> dict[str, dict[Key, list[PlanEntry]]]:
    """{panel: {(component, block): its parameters}}; components in their usual order."""
    found: dict[str, dict[Key, list[PlanEntry]]] = {}
    for entry in plan.entries.values():
        rows = found.setdefault(entry.panel or OUTSIDE, {})
        rows.setdefault((entry.component, entry.block or 0), []).append(entry)
    if OUTSIDE in found:
        found[OUTSIDE] = found.pop(OUTSIDE)  # the last panel
    for title, rows in found.items():
        order = sorted(rows, key=lambda key: (place_of(key[0]), key[1]))
        found[title] = {key: rows[key] for key in order}
    return found


def place_of(component: str) -> tuple[int, str]:
    """What components are sorted by: their usual order from above, others by name behind it."""
    return _ORDER.index(component) if component in _ORDER else len(_ORDER), component


def log_norm(rates: Iterable[float]) -> Any:
    """The log scale of rates; those of 0 are left out."""
    from matplotlib.colors import LogNorm

    shown = set(rates) - {0.0} or {1.0}
    # Room at both ends: equal rates would be a range without a width, which no bar can show.
    return LogNorm(min(shown) / 1.01, max(shown) * 1.01)


def add_bar(figure: Figure, axes: Iterable[Axes], norm: Any) -> None:
    """Add a bar of rates with five even labels: one decade alone has no major log tick."""
    from matplotlib.cm import ScalarMappable

    colours = ScalarMappable(norm=norm, cmap="viridis")
    bar = figure.colorbar(colours, ax=list(axes), label="learning rate", fraction=0.03, pad=0.01)
    low, high = norm.vmin * 1.01, norm.vmax / 1.01
    equal = high <= low * 1.0001
    ticks = [low] if equal else [low * (high / low) ** (i / 4) for i in range(5)]
    bar.set_ticks(ticks, labels=[f"{tick:.1e}" for tick in ticks])
    bar.minorticks_off()
