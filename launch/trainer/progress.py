"""How far training is: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from launch.trainer.options import TrainOptions
from launch.trainer.runtime import Runtime

Show = Callable[[dict[str, Any]], None]
"""Called with the metrics of each step."""


@contextmanager
def progress(train: TrainOptions, done: int, runtime: Runtime) -> Iterator[Show]:
    """Show how far training is, on rank 0.

    Args:
        train: How long the run is, and how often a file gets a line.
        done: Those behind it.
        runtime: This rank.
    """
    if not runtime.is_main:
        yield lambda row: None
    elif sys.stderr.isatty():
        with _bar(train.steps, done) as show:
            yield show
    else:
        yield _lines(train, runtime)


def _text(row: dict[str, Any]) -> str:
    return (
        f"loss {row['loss']:.4f}, {row['s_per_step']:.3f} s/step, {row['peak_memory_gb']:.2f} GiB"
    )


@contextmanager
def _bar(steps: int, done: int) -> Iterator[Show]:
    from tqdm import tqdm

    with tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True) as bar:

        def show(row: dict[str, Any]) -> None:
            # update() below draws the bar, at most ten times a second.
            bar.set_postfix_str(_text(row), refresh=False)
            bar.update()

        yield show


def _lines(train: TrainOptions, runtime: Runtime) -> Show:
    first = True

    def show(row: dict[str, Any]) -> None:
        nonlocal first
        done = row["step"] + 1
        # The first step says that training has begun, the last one that it is through. A bar would
        # be one line of many kilobytes in a file.
        if first or done % train.lines_every == 0 or done == train.steps:
            left = timedelta(seconds=round(row["eta_s"]))
            runtime.say(f"step {done} of {train.steps}: {_text(row)}, {left} left")
            first = False

    return show
