"""Which process is the launcher, and which rank says an error that all of them share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.trainer import launcher
from launch.trainer.launcher import say_once
from tests.support.jobs import ROOT

LIST = "from launch.trainer.launcher import launchers; print([p.pid for p in launchers()])"
PYTHON = f"{sys.executable} -c '{LIST}'; true"  # with a second command, so that no shell execs it


def found_under(script: Path, text: str, **env: str) -> tuple[list[int], int]:
    """Process ids of the launchers of a rank that a script starts, and the script's own."""
    script.parent.mkdir(exist_ok=True)
    script.write_text(f"#!/usr/bin/env bash\n{text}\n")
    script.chmod(0o755)
    process = subprocess.Popen(
        [str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )
    said, _ = process.communicate(timeout=60)
    return [int(pid) for pid in said.strip().strip("[]").split(",") if pid], process.pid


def test_a_launcher_is_found_through_a_script_and_a_shell_is_none(tmp_path: Path) -> None:
    (tmp_path / "wrap.sh").write_text(PYTHON)
    through = f"bash {tmp_path}/wrap.sh; true"
    found, pid = found_under(tmp_path / "bin" / "torchrun", through, RANK="1")
    assert found == [pid]
    found, _ = found_under(tmp_path / "job.sh", through, RANK="1")
    assert found == []
    found, _ = found_under(tmp_path / "bin" / "torchrun", through)  # no rank: one process
    assert found == []


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """This process as a rank of two; markers go to ``tmp_path``."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path))
    return monkeypatch


def test_the_first_rank_speaks_and_where_it_does_not_come_another(
    ranks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ranks.setenv("RANK", "0")
    say_once("both")
    ranks.setenv("RANK", "1")
    say_once("both", patience_s=60.0)
    assert capsys.readouterr().err == "both\n"
    say_once("the second alone", patience_s=0.0)
    ranks.setenv("RANK", "0")
    say_once("the second alone")
    say_once("both")  # met a second time
    assert capsys.readouterr().err == "the second alone\nboth\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_earlier_launch_from_the_same_shell_does_not_silence_this_one(
    ranks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ranks.setenv("RANK", "1")
    say_once("wrong", patience_s=0.0)
    (marker,) = tmp_path.iterdir()
    started = psutil.Process().create_time()
    os.utime(marker, (started - 60.0, started - 60.0))
    say_once("wrong", patience_s=0.0)
    assert capsys.readouterr().err == "wrong\nwrong\n"
    os.utime(marker, (0.0, 0.0))
    say_once("another", patience_s=0.0)
    assert not marker.exists(), "markers of launches that are long over go"


def test_an_error_is_said_where_nothing_can_be_marked(
    ranks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ranks.setattr(launcher.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    ranks.setenv("RANK", "0")
    say_once("wrong")
    assert capsys.readouterr().err == "wrong\n"


def test_a_process_that_nobody_has_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    held = psutil.Process(process.pid)
    end = time.monotonic() + 60.0
    while held.is_running() and held.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
    assert launcher._is_gone(held)
    process.wait()
    assert launcher._is_gone(held)
