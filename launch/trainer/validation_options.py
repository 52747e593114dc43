"""The config's ``validation`` block, and ``train.early_stop``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.fields import setting


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Which samples never train, and how often their loss is read."""

    share: float | None = setting(
        fields.number(0.0, 1.0, open_low=True),
        default=None,
        shown="none held out",
        doc="Share of the samples that is held out: those whose name's digest is below it, so that"
        " a data set that grows never trains what was held out before.",
    )
    count: int | None = setting(
        fields.integer(1),
        default=None,
        shown="none held out",
        unit="samples",
        doc="Held out instead of a share: those with the smallest digests.",
    )
    every: int = setting(
        fields.integer(1),
        default=100,
        unit="steps",
        doc="Between readings; the last step has one too.",
    )
    levels: tuple[float, ...] | None = setting(
        fields.numbers(at_least=1),
        default=None,
        shown="[0.1, 0.3, 0.5, 0.7, 0.9] where there is noise",
        doc="Places in the range of noise that is trained at which each sample is read: 0 is the"
        " least noise.",
    )
    batch: int | None = setting(
        fields.integer(1),
        default=None,
        shown="train.micro_batch, or 1",
        unit="samples",
        doc="In one forward of one rank.",
    )

    @property
    def on(self) -> bool:
        """Whether samples are held out."""
        return self.share is not None or self.count is not None


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When a run has learned what it can."""

    patience: int = setting(
        fields.integer(1),
        default=5,
        unit="readings",
        doc="Readings of the validation loss, one after the other, that are no better than the"
        " best; the run then ends.",
    )
    min_delta: float = setting(
        fields.number(0.0), default=0.0, doc="By how much a better reading must be below the best."
    )


def _early_stop(path: str, value: object) -> EarlyStop:
    return EarlyStop(**fields.read(path, fields.mapping(path, value), EarlyStop))


EARLY_STOP = fields.Check(
    _early_stop, "a JSON object, see below", lambda: fields.object_schema(EarlyStop)
)
"""Parses ``train.early_stop``."""


def level_name(level: float) -> str:
    """How metrics and logs call a level."""
    return f"{level:g}"


def read_validation(values: Mapping[str, Any], early_stop: EarlyStop | None) -> ValidationOptions:
    """Make the block of what a config gives, checked field by field already.

    Raises:
        ConfigError: a share and a count, a level twice, settings of nothing, or an early stop that
            nothing tells.
    """
    found = ValidationOptions(**values)
    if found.share is not None and found.count is not None:
        raise ConfigError(
            f"Invalid validation.share={found.share:g} with validation.count={found.count}: each"
            " says how much is held out; remove one of them."
        )
    shown = [level_name(level) for level in found.levels or ()]
    for name in shown:
        if shown.count(name) > 1:
            raise ConfigError(
                f"Invalid validation.levels={list(found.levels or ())}: {name} is there twice, to"
                " the six digits that metrics are named with. Give each level once."
            )
    if values and not found.on:
        key = next(iter(values))
        raise ConfigError(
            f"Invalid validation.{key} without samples that are held out: add validation.share or"
            " validation.count, or remove it."
        )
    if early_stop is not None and not found.on:
        raise ConfigError(
            "Invalid train.early_stop without a validation loss: add validation.share or"
            " validation.count, or remove it."
        )
    return found
