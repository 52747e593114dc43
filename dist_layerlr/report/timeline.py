"""A trace of a streamed step as a picture: time across, a line for each queue of the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_layerlr.errors import ConfigError
from dist_layerlr.report.drawing import check_picture, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("compute", "wait", "copy", "gradients")
"""Kinds of work, from above; as ``offload/trace.py`` names them."""
_TITLES = ("compute", "compute waits", "to the device", "gradients back")
_COLOURS = {"forward": "#4477aa", "backward": "#66ccee", "wait": "#cc3311"}
_COPIES = ("#228833", "#99cc77")
"""In turn, so that neighbours can be told apart."""
_NAMED = 0.035
"""Least share of the picture that a name fits into."""


def draw_step(trace: Path, picture: Path) -> None:
    """Draw what ``handle.trace`` wrote as a PNG, 1200 pixels wide.

    Raises:
        ConfigError: matplotlib is not installed, the trace holds no work, or a file cannot be read
            or written.
    """
    check_picture(picture)
    work = _read(trace)
    begin = min(e["ts"] for e in work)
    length = max(e["ts"] + e["dur"] for e in work) - begin
    figure = new_figure(3.4)
    axis = figure.subplots()
    for line, kind in enumerate(LINES):
        _draw_line(axis, line, [e for e in work if e["cat"] == kind], begin, length)
    axis.set_yticks(range(len(LINES)), _TITLES)
    axis.set_ylim(len(LINES) - 0.4, -0.6)  # the first line on top
    axis.set_xlim(0, length / 1e3)
    axis.set_xlabel("ms")
    axis.set_title(_summary(work), loc="left", fontsize=11)
    save(figure, picture)


def _read(trace: Path) -> list[dict[str, Any]]:
    """Pieces of work of a trace."""
    try:
        events = json.loads(trace.read_text())["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Cannot read trace {str(trace)!r}: {error}. Give the file that handle.trace wrote."
        ) from None
    work = [e for e in events if e.get("cat") in LINES]
    if not work:
        raise ConfigError(
            f"Invalid trace {str(trace)!r}: no unit was streamed in it. Run a step inside"
            " `with handle.trace(path):`."
        )
    return work


def _draw_line(
    axis: Axes, line: int, work: list[dict[str, Any]], begin: float, length: float
) -> None:
    for i, piece in enumerate(work):
        start, took = (piece["ts"] - begin) / 1e3, piece["dur"] / 1e3
        axis.barh(line, took, left=start, height=0.7, color=_colour(piece, i), linewidth=0)
        if piece["dur"] > _NAMED * length and piece["cat"] != "wait":
            # The number of the block alone: its stack is the same along a line.
            name = piece["name"].rpartition(".")[2]
            axis.text(start + took / 2, line, name, ha="center", va="center", fontsize=8)


def _colour(piece: dict[str, Any], number: int) -> str:
    if piece["cat"] == "compute":
        return _COLOURS["backward" if piece["args"]["backward"] else "forward"]
    return _COLOURS.get(piece["cat"], _COPIES[number % 2])


def _summary(work: list[dict[str, Any]]) -> str:
    """One line of numbers."""
    totals = dict.fromkeys(LINES, 0.0)
    moved = dict.fromkeys(LINES, 0)
    for piece in work:
        totals[piece["cat"]] += piece["dur"]
        moved[piece["cat"]] += piece["args"].get("bytes", 0)
    text = f"{moved['copy'] / 1e9:.2f} GB to the device"
    if totals["copy"]:
        hidden = max(0.0, 1 - totals["wait"] / totals["copy"])
        text += f" at {moved['copy'] / totals['copy'] / 1e3:.1f} GB/s, {hidden:.0%} of it hidden"
    if totals["gradients"]:
        speed = moved["gradients"] / totals["gradients"] / 1e3
        text += f"; {moved['gradients'] / 1e9:.2f} GB of gradients back at {speed:.1f} GB/s"
    return f"{text}. Forward dark, backward light."
