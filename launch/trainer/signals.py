"""SIGINT and SIGTERM become a flag that the training loop reads between microbatches."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """Set by SIGINT and SIGTERM. The loop then finishes the microbatch in progress and saves."""

    def __init__(self) -> None:
        self.raised = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle the signal."""
        # Nothing else: a handler may run in the middle of any bytecode of the main thread.
        self.raised = True


@contextmanager
def catch_signals() -> Iterator[StopFlag]:
    """Turn SIGINT and SIGTERM into a flag inside the block, however many come.

    On Ctrl-C every rank gets two signals: one from the terminal, one from torchrun. SIGQUIT and
    SIGKILL end a run at once.
    """
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        # The caller's handlers return, so that a library or a test that calls main() keeps its own.
        for number, handler in before.items():
            signal.signal(number, handler)
