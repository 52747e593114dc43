"""Models that the tests of cached latents share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.latents import Models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """One set of tiny models for all files; only the tests that ask need the train extra."""
    from tests.support.latents import make_models

    return make_models(tmp_path_factory.mktemp("models"))
