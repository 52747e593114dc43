"""The commands of docs/start.md, one after the other, in an empty folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch import cache_latents, tiny, train
from tests.support.pages import blocks, fenced, read

ROOT = Path(__file__).resolve().parents[2]
PAGE = read("docs/start.md")
TAKEN = {*blocks("docs/start.md", "bash"), *blocks("docs/start.md", "python")}
BLOCKS = [(b.language, b.text) for b in fenced("docs/start.md") if b.text in TAKEN]
PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "launch/tiny.py": tiny.main,
    "launch/cache_latents.py": cache_latents.main,
    "launch/train.py": train.main,
}


def test_a_stranger_needs_fewer_than_ten_commands() -> None:
    lines = [len(text.splitlines()) if kind == "bash" else 1 for kind, text in BLOCKS]
    assert sum(lines) < 10


def test_every_step_runs_as_it_stands_and_the_pipeline_draws_with_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launch").mkdir()
    shutil.copytree(ROOT / "launch" / "configs", tmp_path / "launch" / "configs")
    monkeypatch.chdir(tmp_path)
    installs, *rest = BLOCKS
    # This environment is there already, made by the same program.
    assert installs[1].startswith(
        "bash requirements/install.sh requirements/quickstart.txt .venv\n"
    )
    assert (ROOT / "requirements" / "install.sh").is_file()
    for kind, text in rest:
        if kind == "python":
            exec(compile(text, "docs/start.md", "exec"), {"__name__": "docs"})
            continue
        for line in text.splitlines():
            python, program, *arguments = shlex.split(line)
            assert python == "python"
            assert PROGRAMS[program](arguments) == 0, line
    said = capsys.readouterr().out
    # What the encoder says to do next is the beginning of what the page says.
    (following,) = re.findall(r"next: (python launch/train\.py .*)", said)
    assert f"{following} --plan-only\n" in PAGE
    assert "verified on 1 rank" in said and "everything to look at in runs/start/page.html" in said
    rows = map(json.loads, Path("runs/start/metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "val_loss" in row] == [19, 39]
    assert Path("three.png").stat().st_size > 1000
