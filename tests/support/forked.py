"""Run a test's body in a process of its own.

A process that has run a backward pass cannot fork ranks any more, `sim` must be registered before
the first one, and a kernel's exception on it may end the process.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICES = ("cpu", "sim", "cuda")
DEADLINE_S = 120.0
Outcome = tuple[str, str]
"""("passed" | "failed" | "skipped", text)."""


def in_fork(body: Callable[[], Any], device: str) -> Outcome:
    """Run ``body`` in a forked process on which ``device`` exists."""
    receive, send = mp.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        receive.close()
        send.send(_attempt(body, device))
        os._exit(0)
    send.close()
    try:
        if not receive.poll(DEADLINE_S):
            return "failed", f"not done after {DEADLINE_S:g} s"
        return receive.recv()
    except EOFError:
        return "failed", "the process died"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _attempt(body: Callable[[], Any], device: str) -> Outcome:
    try:
        torch.manual_seed(0)
        if device == "sim":
            import sim_device  # noqa: F401
        if device == "cuda" and not torch.cuda.is_available():
            return "skipped", "no CUDA device"
        body()
    except pytest.skip.Exception as reason:
        return "skipped", str(reason)
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""
