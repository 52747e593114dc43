"""One wording for whatever a library raises over a user's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dist_layerlr.errors import ModelSourceError


@contextmanager
def blame(subject: str, next_step: str) -> Iterator[None]:
    """Word any failure inside as one ModelSourceError: the libraries raise unrelated types for one
    damaged file.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelSourceError(f"{subject} ({reason}); {next_step}.") from error
