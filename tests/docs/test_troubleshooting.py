"""docs/troubleshooting.md lists what the code raises now."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ERRORS: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "errors.py"))


def test_the_page_is_that_of_the_code() -> None:
    written = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert written == ERRORS["page"](), "run `python docs/errors.py` and commit what it wrote"


def test_texts_are_read_with_what_is_filled_in_named() -> None:
    code = """
raise ConfigError(
    f"Invalid {path}.eps={value!r}: {type(error).__name__} of {entry.name}"
    f" must be above 0 ({len(rows)} rows)."
)
raise fields.invalid(path, value, "a number")
raise KeyError(name)
"""
    text = "Invalid <path>.eps=<value>: <error> of <name> must be above 0 (<rows> rows)."
    assert list(ERRORS["raised"](ast.parse(code))) == [(text, "ConfigError")]
