"""What all importers share: the block they fill, and how they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError

Settings = Mapping[str, Any]
Region = dict[str, Any]
# Names that transformers' Trainer gives no weight decay, as it tells them by name alone.
NO_DECAY = r"re:(?i:bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.))"


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A config in the making."""

    learning_rate: float
    regions: list[Region] = field(default_factory=list)
    block: dict[str, Any] = field(default_factory=dict)
    """Further fields of ``per_layer_lr``."""
    notes: list[str] = field(default_factory=list)
    """What the other project does that a config cannot say, or that it does by accident."""

    def config(self) -> dict[str, Any]:
        """The training config."""
        block: dict[str, Any] = {
            "enabled": True,
            "component_lr": {},
            "default_lr": self.learning_rate,
            "depth_strategy": "flat",
            "unmatched": "default",
            **self.block,
        }
        if self.regions:
            block["regions"] = self.regions
        return {"learning_rate": self.learning_rate, "per_layer_lr": block}


def rate(given: Settings, key: str, default: float | None = None, *, place: str = "") -> float:
    """A rate that must be there, or has a default.

    Args:
        given: the settings.
        key: of the rate.
        default: the rate where the key is not given.
        place: where the settings stand in their file, such as ``lr_groups[0]``.

    Raises:
        ConfigError: missing, or no number >= 0.
    """
    value = number(given, key, place=place)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(
            f"Missing {key} in {place or 'the settings'}: rates are absolute here. Add it."
        )
    return value


def number(given: Settings, key: str, *, place: str = "") -> float | None:
    """A number >= 0, also where it is written as text; None where it is not given.

    Args:
        given: the settings.
        key: of the number.
        place: as in ``rate``.

    Raises:
        ConfigError: anything else.
    """
    value = given.get(key)
    if value is None or value == "":
        return None
    path = f"{place}.{key}" if place else key
    # Arguments of a command line, and PyYAML's 1e-4, are text.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise fields.invalid(path, value, "a number >= 0") from None
    return fields.number(0.0)(path, value)


def refuse(given: Settings, keys: Mapping[str, str]) -> None:
    """Refuse settings that a plan has no counterpart of.

    Args:
        given: the settings.
        keys: {key: why, and what to do}.

    Raises:
        ConfigError: one of them is given.
    """
    for key, why in keys.items():
        if given.get(key):
            raise ConfigError(f"Cannot convert {key}={given[key]!r}: {why}.")
