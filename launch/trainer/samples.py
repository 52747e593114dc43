"""One picture of what the model makes: generated clips beside real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_layerlr.files import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FRAME_INCHES, _GAP, _INK, _PALE = 0.82, 0.06, "#222222", "#777777"
_MOST_FRAMES, _MOST_LETTERS = 8, 30


def draw_samples(
    path: str | Path, generated: Tensor, real: Tensor | None, labels: Sequence[str]
) -> None:
    """Write one PNG: a row per clip, generated frames on the left, real ones on the right.

    Both are of the same prompt. Images are drawn as clips of one frame.

    Args:
        path: file to write; its folder is made if missing.
        generated: (N, C, F, H, W) or (N, C, H, W) with N >= 1. One channel is drawn grey and three
            as RGB, [-1, 1] black to white. Of any other number the first three (or the first) are
            drawn, each clip stretched to its own range.
        real: like ``generated``, the same N; None: generated frames alone are drawn.
        labels: N prompts or class names; long ones are cut.

    Of clips with more than 8 frames, 8 evenly spaced ones are drawn.
    """
    columns = [generated] if real is None else [generated, real]
    assert {len(one) for one in columns} == {len(labels)} and labels, f"{len(labels)=}"
    # Not pyplot: it would keep figures alive and choose a window toolkit.
    from matplotlib.figure import Figure

    columns = [one.unsqueeze(2) if one.ndim == 4 else one for one in columns]
    labels, of = [_short(label) for label in labels], columns[0].shape[2]
    # Evenly spaced frames: the first and the last are always drawn.
    chosen = torch.linspace(0, of - 1, min(of, _MOST_FRAMES)).round().long()
    columns = [one[:, :, chosen.to(one.device)] for one in columns]
    rows, frames = len(labels), len(chosen)
    label_inches = 0.3 + 0.085 * max(len(label) for label in labels)
    width, height = (
        label_inches + len(columns) * _FRAME_INCHES * frames + 0.5,
        0.5 + rows * (_FRAME_INCHES + 0.07),
    )
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    figure.subplots_adjust(wspace=0.08, hspace=0.1)
    figure.subplots_adjust(
        left=label_inches / width, right=1 - 0.1 / width, top=1 - 0.4 / height, bottom=0.1 / height
    )
    for row, label in enumerate(labels):
        for column, shown in enumerate(columns):
            _draw_strip(axes[row][column], shown[row])
        axes[row][0].set_ylabel(
            label,
            rotation=0,
            ha="right",
            va="center",
            labelpad=8,
            fontsize=10,
            color=_INK,
            parse_math=False,
        )
    for column, title in enumerate(("generated", "real")[: len(columns)]):
        which = f", {frames} of {of} frames" if of > frames else f", frames 1 to {of}"
        # Beside one or two frames there is no room for more than the word.
        axes[0][column].set_title(
            title + which if frames > 2 else title, fontsize=10, color=_PALE, pad=8
        )
    _write(Path(path), figure)


def _write(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is killed while it draws keeps the picture that was there.
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _short(label: str) -> str:
    """One line of a label, its end cut off where it is long."""
    line = " ".join(label.split())
    return line if len(line) <= _MOST_LETTERS else line[: _MOST_LETTERS - 1].rstrip() + "…"


def _draw_strip(axes: Axes, clip: Tensor) -> None:
    """Draw the frames of one clip (C, F, H, W) side by side."""
    axes.imshow(_strip(_pixels(clip)).numpy(), interpolation="nearest", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _pixels(clip: Tensor) -> Tensor:
    """(C, F, H, W) -> (F, H, W, 3) in [0, 1]."""
    clip = clip.detach().float().cpu()
    channels = clip.shape[0]
    shown = clip[:3] if channels >= 3 else clip[:1]
    if channels in (1, 3):
        shown = (shown.clamp(-1, 1) + 1) / 2
    else:
        low, high = shown.amin(), shown.amax()
        shown = (shown - low) / (high - low).clamp(min=1e-6)
    return shown.nan_to_num().expand(3, *shown.shape[1:]).permute(1, 2, 3, 0)


def _strip(pixels: Tensor) -> Tensor:
    """(F, H, W, 3) -> (H, F * (W + gap) - gap, 3), white between frames."""
    frames, height, width, _ = pixels.shape
    gap = max(1, round(width * _GAP))
    padded = torch.ones(frames, height, width + gap, 3)
    padded[:, :, :width] = pixels
    return padded.permute(1, 0, 2, 3).reshape(height, -1, 3)[:, :-gap]
