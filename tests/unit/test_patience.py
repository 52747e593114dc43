"""The rank harness gives up on what hangs or spins, and on nothing that is merely slow."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.support.patience import Patience

SLEEPS = "import time; print(flush=True); time.sleep(600)"
SPINS = "print(flush=True)\nwhile True: pass"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPINS!r}])"

Start = Callable[[str], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program, wait for its first line, return its process id."""
    started = []

    def one(program: str) -> int:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield one
    for process in started:
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()
        process.wait()


def said(patience: Patience) -> str:
    while not (ends := patience.ends()):
        time.sleep(0.05)
    return ends


def test_processes_that_wait_for_each_other_are_called_a_hang(start: Start) -> None:
    assert "hang" in said(Patience([start(SLEEPS), start(SLEEPS)], still_s=1.0))


@pytest.mark.parametrize("program", [SPINS, PARENT], ids=["its own", "of what it started"])
def test_one_that_works_is_waited_for_until_its_cpu_time_is_spent(
    start: Start, program: str
) -> None:
    begun = time.monotonic()
    ends = said(Patience([start(program), start(SLEEPS)], still_s=60.0, cpu_s=2.0))
    assert "CPU time (at most 2)" in ends
    assert time.monotonic() - begun > 1.5
