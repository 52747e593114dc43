"""Jobs that are hurt on purpose: a launcher, its ranks, and what may happen to them.

The launcher is a process of its own that forks the ranks, and ends them when one fails, as torchrun
does. Both are forked from the test, whose imports they share: a real launcher takes longer to start
than these runs take.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from launch import train
from launch.trainer import launcher
from tests.support.jobs import DEADLINE_S

GONE_S = 30.0
"""No process of a job that was hurt is left after this time."""
ROOM = 1024
"""Bytes that a file may have on the disk that is full."""


def wait_until(done: Callable[[], bool], ended: Callable[[], bool]) -> None:
    """Wait for a condition; the deadline only ends a hang."""
    end = time.monotonic() + DEADLINE_S
    while not done():
        assert not ended(), "the run ended by itself"
        assert time.monotonic() < end, "no progress"
        time.sleep(0.02)


def rows(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, as far as it is whole."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, whether or not anybody has waited for it."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes: list[psutil.Process], within_s: float = GONE_S) -> bool:
    """Wait for processes to end."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if all(map(is_gone, processes)):
            return True
        time.sleep(0.02)
    return False


class Job:
    """A launcher and its ranks."""

    def __init__(self, arguments: list[str], ranks: int):
        # Not a file: one on a full disk would not grow either. A run prints far less than fits.
        self._pipe, end = os.pipe()
        os.set_blocking(self._pipe, False)
        self._said = b""
        pid = os.fork()
        if pid == 0:
            _launch(arguments, ranks, end)
        os.close(end)
        self.launcher = psutil.Process(pid)
        wait_until(lambda: len(self.launcher.children()) == ranks, lambda: is_gone(self.launcher))
        # In the order in which they were started.
        self.ranks = sorted(self.launcher.children(), key=lambda process: process.pid)

    @property
    def said(self) -> str:
        """What launcher and ranks have printed."""
        try:
            while part := os.read(self._pipe, 1 << 16):
                self._said += part
        except BlockingIOError:
            pass
        return self._said.decode()

    def wait(self) -> int:
        """Exit status of the launcher; negative after a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.launcher.pid, 0)[1])

    def end(self) -> None:
        """Leave nothing behind, whatever the test has found."""
        for process in [*self.ranks, self.launcher]:
            if not is_gone(process):
                process.kill()
        os.close(self._pipe)


@contextmanager
def started(arguments: list[str], ranks: int) -> Iterator[Job]:
    """A job, which is over at the end of the block."""
    job = Job(arguments, ranks)
    try:
        yield job
    finally:
        job.end()


def _launch(arguments: list[str], ranks: int, pipe: int) -> None:
    """The launcher's process."""
    for stream in (1, 2):
        os.dup2(pipe, stream)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _train(arguments, rank, ranks, port)
        pids.append(pid)

    def pass_on(number: int, frame: object = None) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    signal.signal(signal.SIGTERM, pass_on)
    worst = 0
    for _ in range(ranks):
        _, ended = os.wait()
        if ended and not worst:
            worst = abs(os.waitstatus_to_exitcode(ended))
            pass_on(signal.SIGTERM)
    os._exit(worst)


def _train(arguments: list[str], rank: int, ranks: int, port: int) -> None:
    """One rank's process."""
    import gc
    import sys

    gc.freeze()
    torch.set_num_threads(1)
    # Not pytest's, which keeps what is printed.
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    status = 1
    try:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        count = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), **count, **where)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        launcher.launchers.cache_clear()
        launcher.end_with_launcher("train.py")
        status = train.main(arguments)
    except Exception:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# What may happen to a job


def kill_first_rank(job: Job) -> None:
    job.ranks[0].kill()


def kill_last_rank(job: Job) -> None:
    job.ranks[-1].kill()


def kill_launcher(job: Job) -> None:
    job.launcher.kill()


def freeze_a_rank_and_kill_the_launcher(job: Job) -> None:
    """The other ranks then wait for one that cannot hear of it, until it goes on."""
    job.ranks[-1].suspend()
    job.launcher.kill()
    assert all_gone(job.ranks[:-1])
    job.ranks[-1].resume()


def stop(job: Job) -> None:
    job.launcher.terminate()


def fill_disk(job: Job) -> None:
    """No file may grow any more, as on a disk that is full."""
    for process in job.ranks:
        hard = process.rlimit(psutil.RLIMIT_FSIZE)[1]
        process.rlimit(psutil.RLIMIT_FSIZE, (ROOM, hard))


Fault = Callable[[Job], None]
