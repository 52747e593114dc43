"""Run a test's body in a process of its own.

A process that has run a backward pass cannot fork ranks any more, `sim` must be registered before
the first one, and a kernel's exception on it may end the process.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.cases import attempt

DEVICES = ("cpu", "sim", "cuda")
DEADLINE_S = 600.0


def in_fork(body: Callable[[], Any], device: str) -> tuple[str, str]:
    """Run ``body`` in a forked process on which ``device`` exists; return (kind, text)."""
    receive, send = mp.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        receive.close()
        outcome = attempt(_body, body, device)
        # What a body returns stays here: it may hold tensors, whose storages are not sent.
        send.send((outcome.kind, outcome.text))
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


def _body(body: Callable[[], Any], device: str) -> None:
    # First, by one thread: a fork's first call makes torch's pool of threads anew, and two calls at
    # once (this thread's and autograd's) would find it half made and end the process.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if device == "sim":
        from tests.support import sim_device  # noqa: F401  registers the device
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    body()
