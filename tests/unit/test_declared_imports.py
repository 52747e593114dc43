"""pyproject.toml declares every package that the project imports, where it is imported, and no other."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = {
    "dist_layerlr": ("plot",),
    "launch": ("train", "plot"),
    "benchmarks": ("train", "plot"),
    "tests": ("train", "plot", "dev"),
}
"""Folder: the extras that its imports may come from, besides the dependencies."""
OPTIONAL = {("benchmarks", "ramtorch")}
"""Imported only if someone installed it, to be compared with."""
TOOLS = {"ruff", "mypy", "pre-commit"}
"""Declared to be run, not imported."""


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    lines = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    # A requirement starts with the name; what follows is a range or a marker.
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}  # type: ignore[index]


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def ours() -> set[str]:
    """Names under which files and folders of this repository are imported."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {*FOLDERS, *(path.stem for path in paths), *(path.parent.name for path in paths)}


def third_party(folder: str) -> set[str]:
    files = (ROOT / folder).rglob("*.py")
    names = {name for file in files for name in imported(ast.parse(file.read_text(encoding="utf-8")))}
    return names - sys.stdlib_module_names - ours() - {name for where, name in OPTIONAL if where == folder}


DISTRIBUTIONS = {module: {normal(d) for d in names} for module, names in packages_distributions().items()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_of_a_folder_is_declared(folder: str) -> None:
    allowed = declared(*FOLDERS[folder])
    # tomli is installed below Python 3.11 only, where its name is the distribution's.
    undeclared = [m for m in third_party(folder) if not DISTRIBUTIONS.get(m, {normal(m)}) & allowed]
    assert sorted(undeclared) == []


def test_every_declared_package_is_imported_or_is_a_tool() -> None:
    modules = set().union(*map(third_party, FOLDERS))
    used = {d for module in modules for d in DISTRIBUTIONS.get(module, {normal(module)})}
    assert sorted(declared(*PROJECT["optional-dependencies"]) - used - TOOLS) == []


def test_the_walker_sees_imports_inside_functions_and_skips_relative_ones() -> None:
    tree = ast.parse("import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n")
    assert set(imported(tree)) == {"a", "c", "h"}
