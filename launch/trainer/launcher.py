"""What started this rank: one error line for all ranks of a machine, and an end with the launcher.

A launcher (torchrun, ``deepspeed``, ``accelerate launch``) ends all ranks when one of them fails,
and ends none when it is killed itself. Imports no torch: both must work from the first moment on.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import psutil

from dist_layerlr.errors import error_line

SPEAKER_S = 15.0
"""How long other ranks wait for the first one of their machine to say an error, which they share.
It may still be importing: ranks start at one moment, but read one disk."""
ORPHAN_S = 20.0
"""How long ranks without a launcher may take to save and end."""
_LOOK_S, _WAIT_S = 1.0, 0.05
_LAUNCHER_GONE = (
    "the launcher is gone (killed, or out of memory): its ranks save if they can, and end. Start"
    " the job again with --resume latest."
)
_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.launch",
    "torch.distributed.run",
    "torchrun",
}
"""Programs and modules whose end is the end of the ranks below them."""
_SHELLS = {"bash", "dash", "fish", "ksh", "sh", "sshd", "zsh"}
"""Parents that training may outlive: somebody logs out."""
_ADOPTERS = {"catatonit", "docker-init", "dumb-init", "init", "systemd", "tini"}
"""Parents of processes whose own parent is gone."""
_STARTED_BY_LAUNCHER = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Environment variables that only torch's launcher or DeepSpeed's sets."""
_OLD_S = 24 * 3600.0


@lru_cache(maxsize=1)
def launchers() -> tuple[psutil.Process, ...]:
    """Processes above this one whose end is its own, the nearest first; looked up once.

    Some launchers have two levels: ``deepspeed`` starts one program that starts the ranks.
    """
    if "RANK" not in os.environ:
        return ()
    found = []
    for level, process in enumerate(psutil.Process().parents()):
        try:
            words, name = process.cmdline(), process.name()
        except psutil.Error:
            continue
        named = any(Path(word).name in _LAUNCHERS for word in words[:4])
        # The direct parent may also be a Python program that uses a launcher's API.
        if named or (level == 0 and name not in _SHELLS | _ADOPTERS):
            found.append(process)
    return tuple(found)


def end_with_launcher(program: str) -> None:
    """Have this process end within seconds of its launcher's end, however that ends. Returns.

    The rank gets SIGTERM first, which training takes for a stop: it saves. Whatever else it does
    then, it is gone after ``ORPHAN_S``.

    Args:
        program: Says why.
    """
    above = launchers()
    # The launcher may be gone before this process could look for it.
    adopted = not above and any(name in os.environ for name in _STARTED_BY_LAUNCHER)
    if not above and not (adopted and _is_adopted()):
        return

    def watch() -> None:
        while above and not any(_is_gone(process) for process in above):
            time.sleep(_LOOK_S)
        # The pipe that standard error went into may have ended with the launcher.
        with suppress(OSError, ValueError):
            say_once(error_line(program, _LAUNCHER_GONE), patience_s=2 * _LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_S)
        os._exit(1)

    # Not PR_SET_PDEATHSIG: it follows the thread that started this process, not the launcher, and
    # knows no second level. A thread that polls has no such conditions.
    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def _is_adopted() -> bool:
    """Whether this process's parent is one that adopts orphans."""
    try:
        parent = psutil.Process().parent()
        return parent is None or parent.name() in _ADOPTERS
    except psutil.Error:
        return True


def _is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has waited for counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_speaker() -> bool:
    """Whether this is the first rank of its machine, or the only process."""
    rank = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    return not rank.isdecimal() or int(rank) == 0


def say_once(line: str, patience_s: float = SPEAKER_S) -> None:
    """Print a line to standard error, from one rank of this machine. All of its ranks call this.

    The first rank prints. The others return when it has: as soon as one rank has left, the
    launcher ends the first, which may not have come so far. If it does not come at all (only some
    ranks have met the error), another prints in its place.

    Args:
        line: The same on all ranks.
        patience_s: How long to wait for the first rank.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _print(line)
        return
    try:
        _say_by_marker(line, _marker(line), patience_s)
    except OSError:
        # No place for a marker: said twice is better than not at all.
        _print(line)


def _say_by_marker(line: str, marker: Path, patience_s: float) -> None:
    import fcntl

    mine = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    end = time.monotonic() + patience_s
    while not is_speaker() and time.monotonic() < end:
        if _said_by(marker) is not None:
            return
        time.sleep(_WAIT_S)
    _remove_old(marker.parent)
    handle = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        # Said and marked under a lock, so that the mark means that the line is out.
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Its own mark does not keep a rank silent: it meets the same error a second time.
        if _said_by(marker) in (None, mine):
            _print(line)
            # On a disk that is full the others say it as well, when they have waited long enough.
            with suppress(OSError):
                os.ftruncate(handle, 0)
                os.write(handle, mine.encode())
    finally:
        os.close(handle)


def _said_by(marker: Path) -> str | None:
    """Rank that has said the line in this launch, if any has."""
    try:
        found = marker.stat()
        # Older than this process: of an earlier launch from the same shell. psutil knows starts to
        # about a second.
        if found.st_uid != os.getuid() or found.st_mtime < psutil.Process().create_time() - 1.0:
            return None
        return marker.read_text() or None
    except FileNotFoundError:
        return None


def _marker(line: str) -> Path:
    """File that all ranks of this launch on this machine, and no others, agree on."""
    # The farthest launcher: a script of the user's may stand between it and each of the ranks.
    above = launchers()
    top = above[-1] if above else psutil.Process().parent()
    started = "" if top is None else f"{top.pid}-{top.create_time()}"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = hashlib.sha256(f"{started}/{attempt}/{line}".encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"dist_layerlr-{os.getuid()}-{key}.said"


def _remove_old(folder: Path) -> None:
    """Remove the markers of launches that are long over."""
    for path in _old(folder.glob(f"dist_layerlr-{os.getuid()}-*.said")):
        path.unlink(missing_ok=True)


def _old(paths: Iterable[Path]) -> list[Path]:
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _OLD_S:
                found.append(path)
    return found


def _print(line: str) -> None:
    # Flushed, because the launcher may kill this process as soon as another rank has left.
    print(line, file=sys.stderr, flush=True)
