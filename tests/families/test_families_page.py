"""docs/families.md says what the code makes of the published models, on the meta device."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "docs" / "families.py"
SPEC = importlib.util.spec_from_file_location("docs_families", FILE)
assert SPEC is not None and SPEC.loader is not None
families = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(families)
PAGE = families.PAGE.read_text(encoding="utf-8")
STALE = "run `python docs/families.py`, look at what changed, and commit the page"


def committed(table: str) -> str:
    """The rows of one table of the page."""
    found = re.search(rf"<!-- families: {table} -->\n(.*?)<!-- end -->", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def test_no_name_of_a_published_model_trains_at_default_lr_but_those_on_the_page():
    assert committed("default") == families.at_default(), STALE


@pytest.mark.parametrize("table", ["overview", "memory"])
@pytest.mark.full
def test_the_other_tables_are_those_that_the_code_makes(table: str):
    """Six minutes, most of them for the activations."""
    assert committed(table) == families.TABLES[table](), STALE
