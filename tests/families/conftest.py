"""Skips each file of this folder, with the reason, where the `families` extra is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.extras import HAS_FAMILIES, WHY_NOT


class Skipped(pytest.Module):
    """A file that is not imported: its imports would fail first."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(WHY_NOT, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Skipped | None:
    """pytest asks this for files beside it alone."""
    return None if HAS_FAMILIES else Skipped.from_parent(parent, path=module_path)
