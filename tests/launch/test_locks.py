"""The locks agree with pyproject.toml and with each other, and environments are made from them and
only from them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    "build.txt": (),
    "quickstart.txt": ("train", "plot"),
    "test.txt": ("train", "plot", "families", "dev"),
    "oldest.txt": ("train", "plot", "dev"),
}


def lock(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line.split("  # via ")[0] for line in lines if not line.startswith("#")]


def direct(name: str) -> list[str]:
    """The requirements that a lock resolves."""
    if name == "build.txt":
        found: list[str] = PROJECT["dependency-groups"]["build"]
        return found
    project = PROJECT["project"]
    return [
        *project["dependencies"],
        *(r for extra in EXTRAS[name] for r in project["optional-dependencies"][extra]),
    ]


def package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].replace("_", "-").lower()


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_names_exact_releases_no_host_no_path_and_no_build_of_torch(name: str) -> None:
    for line in lock(name):
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line), line
    assert not re.search(
        r"://|/(home|root|work|tmp)/|--", (ROOT / "requirements" / name).read_text()
    )
    assert [line for line in lock(name) if line.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.parametrize("name", EXTRAS)
def test_a_lock_holds_every_direct_dependency(name: str) -> None:
    assert {package(r) for r in direct(name)} - {package(line) for line in lock(name)} == set()


def test_the_oldest_lock_holds_lower_bounds() -> None:
    """A patch release may stand for a bound that names none."""
    held = {package(line): line.split(" ;")[0].split("==")[1] for line in lock("oldest.txt")}
    for requirement in direct("oldest.txt"):
        floor = re.search(r">=([\w.]+)", requirement)
        assert floor is not None, f"{requirement} has no lower bound"
        same = held[package(requirement)]
        assert same == floor[1] or same.startswith(f"{floor[1]}."), (
            f"{requirement} is locked at {same}"
        )


def test_quickstart_trains_with_the_releases_that_are_tested() -> None:
    quickstart, test = (
        {line.split(" ; ")[0] for line in lock(name)} for name in ("quickstart.txt", "test.txt")
    )
    assert quickstart - test == set()


PIP = """told="$*"
echo "${told##*--no-build-isolation }" >> pip.log
"""
PYTHON = """shift 2  # -m venv
if [ "$1" = --clear ]; then shift; rm -r "$1"; echo cleared >> pip.log; fi
mkdir -p "$1/bin" && cp pip "$1/bin"
cp pip "$1/bin/python"
"""


@pytest.mark.parametrize(("row", "name"), [("oldest", "oldest.txt"), ("locked", "test.txt")])
def test_readmes_table_of_tested_releases_is_that_of_the_locks(row: str, name: str) -> None:
    lines = re.findall(r"^\| .*\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
    }
    (packages,) = (line.split("|")[2:-1] for line in lines if "| DeepSpeed |" in line)
    for title, release in list(zip(packages, cells[row], strict=True))[1:]:  # the first is Python
        # A release may hold for some Pythons only.
        assert f"{title.strip().lower()}=={release}" in [
            line.split(" ; ")[0] for line in lock(name)
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What install.sh reads, and a python whose environments hold a pip and a python that write
    down what they are told."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, script in {"pip": PIP, "python": PYTHON}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def install(checkout: Path) -> list[str]:
    """Run install.sh. Returns what it told pip."""
    script = checkout / "requirements" / "install.sh"
    command = ["bash", str(script), "requirements/test.txt", "env"]
    subprocess.run(command, env={**os.environ, "PYTHON": str(checkout / "python")}, check=True)
    log = checkout / "pip.log"
    told = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return told


BUILD, LOCK, OPERATORS, PROJECT_ITSELF = (
    "-r requirements/build.txt",
    "-r requirements/test.txt",
    "requirements/torchvision_ops.py",
    "--no-deps -e .",
)


def test_an_environment_is_made_once_from_the_lock_and_nothing_else(checkout: Path) -> None:
    assert install(checkout) == [BUILD, LOCK, OPERATORS, PROJECT_ITSELF]
    assert install(checkout) == []


def test_an_environment_of_another_lock_is_emptied_and_made_anew(checkout: Path) -> None:
    install(checkout)
    with (checkout / "requirements" / "test.txt").open("a") as file:
        file.write("another==1.0\n")
    assert install(checkout) == ["cleared", BUILD, LOCK, OPERATORS, PROJECT_ITSELF]


def test_an_interrupted_environment_is_finished_and_one_of_somebody_else_is_not_emptied(
    checkout: Path,
) -> None:
    install(checkout)
    (checkout / "env" / "lock.txt").unlink()
    assert install(checkout) == [BUILD, LOCK, OPERATORS]


def test_another_pyproject_installs_the_project_again_and_nothing_else(checkout: Path) -> None:
    install(checkout)
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# another\n")
    assert install(checkout) == [PROJECT_ITSELF]
