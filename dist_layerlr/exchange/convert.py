"""Settings of other projects -> our training config, by format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dist_layerlr import fields
from dist_layerlr.errors import ConfigError
from dist_layerlr.exchange.common import Draft, Settings
from dist_layerlr.exchange.images import from_kohya, from_timm
from dist_layerlr.exchange.language import (
    from_axolotl,
    from_llamafactory,
    from_swift,
    from_torchtitan,
)
from dist_layerlr.plan.config import PLAN_BLOCK, load_config
from dist_layerlr.plan.names import canonical_name
from dist_layerlr.plan.patterns import compile_pattern

FORMATS: Mapping[str, Callable[[Settings], Draft]] = {
    "kohya": from_kohya,
    "timm": from_timm,
    "axolotl": from_axolotl,
    "llamafactory": from_llamafactory,
    "ms-swift": from_swift,
    "torchtitan": from_torchtitan,
}


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A config, and what it does not say."""

    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def convert(source: str, settings: Settings, names: Iterable[str] | None = None) -> Converted:
    """Read the settings of another project.

    Args:
        source: a key of ``FORMATS``.
        settings: what its file holds; tables of sections are looked into.
        names: of the model's parameters. Regions that none of them matches are left out, which the
            others do without a word and a plan refuses.

    Raises:
        ConfigError: an unknown format, a value that cannot be, or rates that would be scaled twice.
    """
    if source not in FORMATS:
        raise fields.invalid("format", source, f"one of {', '.join(FORMATS)}")
    if PLAN_BLOCK in settings:
        raise ConfigError(
            f"Cannot convert settings with a {PLAN_BLOCK!r} block: its rates would be scaled"
            " twice. Remove the block, or the other settings."
        )
    draft = FORMATS[source](_flat(settings))
    config = draft.config()
    notes = list(draft.notes)
    if names is not None:
        _drop_unmatched(config[PLAN_BLOCK], [canonical_name(name) for name in names], notes)
    load_config(config)  # what is handed out is a config that loads
    return Converted(config=config, notes=tuple(notes))


def _flat(settings: Settings) -> dict[str, Any]:
    """Sections of a file, which sd-scripts reads as if there were none."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        # What a project has as a list, and a file as a mapping, is seen and refused by its reader.
        found[key] = value
        if isinstance(value, Mapping):
            found |= value
    return found


def _drop_unmatched(block: dict[str, Any], names: list[str], notes: list[str]) -> None:
    kept = []
    for region in block.get("regions", ()):
        matches = compile_pattern(region["match"])
        if any(map(matches, names)):
            kept.append(region)
        else:
            notes.append(f"left out: {region['match']!r} matches no name of the model")
    if "regions" in block:
        block["regions"] = kept
    spared = []
    for rule in block.get("no_decay", ()):
        # The two rules that are no patterns look at shapes and owners.
        if rule in ("ndim<=1", "norm") or any(map(compile_pattern(rule), names)):
            spared.append(rule)
    if "no_decay" in block:
        block["no_decay"] = spared
