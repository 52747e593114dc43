"""What the `families` extra brings: the oldest lock does without it, since its floors are newer."""

from __future__ import annotations

import importlib.util

import pytest

HAS_FAMILIES = importlib.util.find_spec("timm") is not None
WHY_NOT = "the extra `families` is not installed"
needs_families = pytest.mark.skipif(not HAS_FAMILIES, reason=WHY_NOT)
