"""The tables of config fields in docs/ are those that the code declares."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dist_layerlr.fields import integer, setting, settings
from tests.support.optimizers import adagrad_needs_its_constructor

FILE = Path(__file__).resolve().parents[2] / "docs" / "tables.py"
SPEC = importlib.util.spec_from_file_location("docs_tables", FILE)
assert SPEC is not None and SPEC.loader is not None
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_page_holds_the_tables_as_the_code_declares_them(page: str):
    committed = (tables.DOCS / page).read_text(encoding="utf-8")
    assert committed == tables.filled(page), "run `python docs/tables.py` and commit the page"


def test_the_page_of_the_audit_lists_every_kind_of_finding():
    committed = tables.AUDIT.read_text(encoding="utf-8")
    assert committed == tables.filled_audit(), "run `python docs/tables.py` and commit the page"
    assert "| `dead` | fault | trainable, in no optimizer |" in committed


def test_the_guides_say_what_the_evidence_page_knows():
    committed = tables.GUIDES.read_text(encoding="utf-8")
    assert committed == tables.filled_guides(), "run `python docs/tables.py` and commit the page"
    assert "- `rfdetr`: not measured.\n" in committed
    assert "forgetting better than flat" in committed


def test_every_table_stands_on_a_page():
    pages = "".join((tables.DOCS / page).read_text(encoding="utf-8") for page in tables.PAGES)
    missing = [name for name in tables.tables() if f"<!-- fields: {name} -->" not in pages]
    assert missing == []


def test_every_field_says_what_it_means():
    for name, rows in tables.tables().items():
        for row in rows:
            assert row.doc.endswith("."), f"{name}.{row.key}"
            assert row.check.allowed, f"{name}.{row.key}"


def test_a_declaration_gives_key_value_default_and_unit():
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Options:
        kind: int = setting(integer(2), default=3, key="type", unit="steps", doc="What it is.")
        free: int = 0

    (row,) = settings(Options).values()
    assert (row.key, row.name, row.default, row.unit) == ("type", "kind", "3", "steps")
    assert tables.markdown([row]).splitlines()[-1] == (
        "| `type` | an integer >= 2; steps | 3 | What it is. |"
    )


def rows(page: str) -> list[str]:
    """Lines to compare: all but Adagrad's where this torch takes it under fewer sharders."""
    skipped = "| torch Adagrad |" if adagrad_needs_its_constructor() else "\n"
    return [line for line in page.splitlines() if not line.startswith(skipped)]


def test_the_table_of_optimizers_is_what_trials_show() -> None:
    committed = tables.PROOF.read_text(encoding="utf-8")
    found = rows(tables.filled_proof())
    assert rows(committed) == found, "run `python docs/tables.py` and commit the page"
    for quantised in ("bitsandbytes AdamW8bit", "torchao AdamW8bit"):
        assert f"| {quantised} | exact | refused |" in committed
