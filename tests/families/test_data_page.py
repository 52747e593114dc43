"""The commands of docs/data.md, on a tiny model."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launch import cache_latents, tiny
from launch.trainer.data.cached import CachedDataset
from tests.support.latents import write_image
from tests.support.pages import blocks


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (commands,) = blocks("docs/data.md", "bash")
    monkeypatch.chdir(tmp_path)
    assert tiny.main(["sdxl", "MODEL"]) == 0
    write_image(tmp_path / "photos" / "a.png", 0, (64, 32))
    (tmp_path / "photos" / "a.txt").write_text("a cat")
    programs = {"launch/cache_latents.py": cache_latents.main, "launch/tiny.py": tiny.main}
    # A megapixel is a minute of this machine.
    for line in commands.replace("1048576", "8192").splitlines():
        python, program, *arguments = shlex.split(line)
        assert python == "python" and programs[program](arguments) == 0, line
    assert len(CachedDataset("cache")) == 1
