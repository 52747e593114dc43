"""What may import what, by folder: in the order that docs/architecture.md gives."""

from __future__ import annotations

import re
import sys

import pytest

import dist_layerlr
from tests.support.imports import ROOT, imported, trees

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ORDER = re.findall(r"^```text\n(errors <-.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0].split("<-")
PLACE = {name.strip(): place for place, names in enumerate(ORDER) for name in names.split(",")}
MODULES = {**trees("dist_layerlr"), **trees("launch")}
TOP = "dist_layerlr.__init__"


def folder(name: str) -> str:
    """``plan`` of ``dist_layerlr.plan.build``; empty for what is not ours."""
    top, inner, *_ = [*name.split("."), ""]
    return {"launch": top, "dist_layerlr": inner}.get(top, "")


def test_every_folder_has_its_place():
    assert {folder(module) for module in MODULES.keys() - {TOP}} == PLACE.keys()


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {TOP}))
def test_a_module_imports_its_own_folder_and_what_stands_left_of_it(module: str):
    own = folder(module)
    left = {name for name, place in PLACE.items() if place < PLACE[own]}
    # Only the trainer may ask the top level, which hands out names of every folder.
    left |= {"", own, "__version__", *(dist_layerlr.__all__ if own == "launch" else ())}
    assert not [name for name in imported(MODULES[module]) if folder(name) not in left]


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder(m) == "plan"))
def test_the_plan_imports_the_standard_library_errors_fields_and_files_only(module: str):
    for name in imported(MODULES[module]):
        standard = name.partition(".")[0] in sys.stdlib_module_names
        assert standard or folder(name) in {"plan", "errors", "fields", "files"}, name
