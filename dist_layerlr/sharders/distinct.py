"""Parameters that differ by rank on purpose: experts that each rank keeps for itself, stages."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from dist_layerlr.errors import ConfigError
from dist_layerlr.sharders.base import Sharder
from dist_layerlr.sharders.choose import sharder_of
from dist_layerlr.sharders.model import unwrap

_MARK = "_dist_layerlr_distinct"


def mark_distinct(model: nn.Module, patterns: Iterable[str]) -> None:
    """Say which parameters hold other values on every rank, and are meant to.

    They are then saved once per rank (``experts.0.w1.weight@rank3``), loaded by as many ranks only,
    and left out of the comparison of replicas. What is not marked and differs is refused by
    ``save_checkpoint``, ``export_weights`` and ``verify(deep=True)``. Call it on all ranks, before
    them; a later call replaces the patterns of an earlier one.

    Args:
        model: wrapped or not.
        patterns: of canonical names, as a shell writes them: ``experts.*``.

    Raises:
        ConfigError: a pattern that matches no parameter.
    """
    chosen = tuple(patterns)
    names = {weight.name for weight in sharder_of(model).weights() if not weight.is_buffer}
    for pattern in chosen:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"Invalid pattern {pattern!r} of distinct parameters: it matches none of"
                f" {len(names)} names, such as {sorted(names)[:3]}."
            )
    setattr(unwrap(model), _MARK, chosen)


def distinct_names(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of ``names`` that differ by rank on purpose."""
    # Who marks the model before it is wrapped has marked one of its modules.
    marks = [vars(module)[_MARK] for module in model.modules() if _MARK in vars(module)]
    patterns = [pattern for mark in marks for pattern in mark]
    if not patterns:
        return frozenset()
    return frozenset(n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns))


def alone_names(sharder: Sharder, names: Iterable[str]) -> frozenset[str]:
    """Those of ``names`` of which each rank steps a tensor of its own, without the others."""
    names = list(names)
    # Ranks of an unwrapped model know nothing of each other, in one process group or not.
    if sharder.layout.name == "none":
        return frozenset(names)
    return distinct_names(sharder.model, names)
