"""How far training is: a bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from launch.trainer.runtime import Runtime

LINE_S = 30.0
"""Between lines. A bar in a file would be one line of many kilobytes."""
Show = Callable[[dict[str, Any]], None]
"""Called with the metrics of each step."""


@contextmanager
def progress(steps: int, done: int, runtime: Runtime) -> Iterator[Show]:
    """Show how far training is, on rank 0.

    Args:
        steps: Of the whole run.
        done: Those behind it.
        runtime: This rank.
    """
    if not runtime.is_main:
        yield lambda row: None
    elif sys.stderr.isatty():
        with _bar(steps, done) as show:
            yield show
    else:
        yield _lines(steps, runtime)


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


def _lines(steps: int, runtime: Runtime) -> Show:
    last: float | None = None

    def show(row: dict[str, Any]) -> None:
        nonlocal last
        now, done = time.monotonic(), row["step"] + 1
        # The first step says that training has begun, the last one that it is through.
        if last is None or now - last >= LINE_S or done == steps:
            runtime.say(f"step {done} of {steps}: {_text(row)}")
            last = now

    return show
