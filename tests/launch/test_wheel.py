"""The wheel, installed into an environment of its own, does what README's first lines say without
the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "blocks.0.attn1.to_q.weight": "32x32",
    "blocks.0.ffn.net.0.proj.weight": "64x32",
    "proj_out.weight": "4x32",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the checkout would also ship what an earlier one left in
    ``build/``."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "dist_layerlr", source / "dist_layerlr", ignore=shutil.ignore_patterns("__pycache__")
    )
    # Without isolation pip builds with the setuptools of this environment and asks no index.
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run a program of an environment that holds the wheel. Returns what it printed."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    binaries = folder / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(binaries / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    # torch and the others come from this environment. A .pth file appends their folder behind the
    # wheel's, and .pth files in that folder, an editable install's among them, are not followed.
    here = sysconfig.get_paths(
        vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    )["purelib"]
    (Path(here) / "this_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(program: str, *args: str) -> str:
        command = [str(binaries / program), *args]
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_wheel_holds_the_package_with_its_types_and_licence_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    package = ROOT / "dist_layerlr"
    files = {str(p.relative_to(ROOT)) for p in package.rglob("*.py")} | {"dist_layerlr/py.typed"}
    files |= {str(p.relative_to(ROOT)) for p in (package / "report" / "assets").iterdir()}
    files.add("dist_layerlr/plan/config.schema.json")
    assert {n for n in names if ".dist-info/" not in n} == files
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert fields["License-Expression"] == "Apache-2.0"


def test_readmes_four_lines_run_from_the_wheel(run: Callable[..., str]) -> None:
    block = re.search(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    where = "\nprint(dist_layerlr.__file__)\n"
    *_, line, file = run("python", "-c", block[1] + where).splitlines()
    assert "verified on 1 rank (unsharded)" in line
    assert "/venv/" in file and not file.startswith(str(ROOT))


def test_the_wheels_command_plans_a_tsv(run: Callable[..., str], tmp_path: Path) -> None:
    model, config = tmp_path / "model.tsv", tmp_path / "config.json"
    model.write_text("".join(f"{name}\t{shape}\n" for name, shape in NAMES.items()))
    config.write_text(
        json.dumps({"model_type": "wan", "learning_rate": 1e-4, "per_layer_lr": {"enabled": True}})
    )
    plan = json.loads(run("dist-layerlr", "plan", str(model), "--config", str(config), "--json"))
    assert plan["parameters"].keys() == NAMES.keys()
