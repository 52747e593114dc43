"""pyproject.toml declares every package that the project imports, where it is imported, and no
other."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
import tomli

from tests.support.imports import ROOT, imported, trees

PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = {
    "dist_layerlr": ("plot", "completion"),
    "launch": ("train", "plot", "families", "video"),
    "benchmarks": ("train", "plot", "families"),
    "tests": ("train", "plot", "families", "dev"),
}
"""Folder: the extras that its imports may come from, besides the dependencies."""
OPTIONAL = {
    ("benchmarks", "ramtorch"),
    ("dist_layerlr", "timm"),
    ("dist_layerlr", "transformers"),
    ("dist_layerlr", "triton"),
}
"""Imported only where it is there: to be compared with, since the model is its own, or because a
CUDA build of torch brings it, at the one release that it works with."""
TOOLS = {"ruff", "mypy", "pre-commit", "pytest-xdist"}
"""Declared to be run, not imported."""
OF_DIFFUSERS = {"ftfy", "beautifulsoup4"}
"""Declared because pipelines of diffusers import them to clean captions, without depending on
them."""
OF_RFDETR = {"pytorch-lightning", "torchmetrics", "faster-coco-eval", "pycocotools"}
"""Declared because rfdetr imports them when it trains, without depending on them."""


def declared(*extras: str) -> set[str]:
    """Names of distributions, without ranges and markers."""
    lines = [
        *PROJECT["dependencies"],
        *(line for e in extras for line in PROJECT["optional-dependencies"][e]),
    ]
    return {re.split(r"[^\w.-]", line)[0] for line in lines}


def modules_of(distribution: str) -> set[str]:
    """Top-level names that a distribution is imported by; of one that is not installed (the lower
    bounds are run without `families`) its own name."""
    try:
        return {Path(file).parts[0].removesuffix(".py") for file in files(distribution) or ()}
    except PackageNotFoundError:
        return {distribution.replace("-", "_")}


def ours() -> set[str]:
    """Names under which this repository is imported: its folders, and scripts beside each other."""
    return {*FOLDERS, *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}


def third_party(folder: str) -> set[str]:
    """Top-level names that a folder imports, inside functions too."""
    names = {name.partition(".")[0] for tree in trees(folder).values() for name in imported(tree)}
    optional = {name for where, name in OPTIONAL if where == folder}
    return names - sys.stdlib_module_names - ours() - optional


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_of_a_folder_is_declared(folder: str) -> None:
    allowed = set().union(*map(modules_of, declared(*FOLDERS[folder])))
    assert sorted(third_party(folder) - allowed) == []


def test_every_declared_package_is_imported_or_is_a_tool() -> None:
    modules = set().union(*map(third_party, FOLDERS))
    assert [
        d
        for d in sorted(
            declared(*PROJECT["optional-dependencies"]) - TOOLS - OF_RFDETR - OF_DIFFUSERS
        )
        if not modules_of(d) & modules
    ] == []
