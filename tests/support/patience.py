"""When to give up on processes that one waits for: when they stand still, not when they are slow.

Other work on the machine may make a test twenty times slower, so time on the clock says nothing. A
process that hangs waits, and uses no CPU time; one that spins uses more of it than any test needs.
"""

from __future__ import annotations

import time

import psutil

STILL_S = 240.0
"""How long processes may use next to no CPU time, on a clock."""
CPU_S = 1500.0
"""CPU time of all together, many times what any file of tests needs."""
AWAKE = 0.005
"""Share of a core below which they stand still: a poll of a file uses less, any work far more."""


class Patience:
    """Waits for processes and what they started, such as compilers."""

    def __init__(self, pids: list[int], *, still_s: float = STILL_S, cpu_s: float = CPU_S):
        """Wait until they stand still for ``still_s``, or have used ``cpu_s`` together."""
        self._pids, self._still_s, self._cpu_s = pids, still_s, cpu_s
        self._since, self._used = time.monotonic(), 0.0

    def ends(self) -> str | None:
        """Why to wait no longer, in words; None: go on."""
        now, used = time.monotonic(), _cpu_seconds(self._pids)
        if used > self._cpu_s:
            return f"not done after {used:.0f} s of CPU time (at most {self._cpu_s:g})"
        if used < self._used:
            self._used = used  # a compiler ended, and took its time with it
        if used - self._used > AWAKE * (now - self._since):
            self._since, self._used = now, used
        if now - self._since > self._still_s:
            return f"hang: next to no CPU time in {self._still_s:g} s"
        return None


def _cpu_seconds(pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            process = psutil.Process(pid)
            for one in [process, *process.children(recursive=True)]:
                times = one.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return total
