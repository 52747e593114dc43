"""Write the tables of config fields into the docs, from the fields' own declarations.

    python docs/tables.py

A table stands between ``<!-- fields: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

from dist_layerlr.fields import Setting, settings
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.plan.config import PRESET, Config, PatternRule, PerLayerLR, Region
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.presets import RfdetrPreset
from launch.trainer.options import BLOCKS, RunOptions

DOCS = Path(__file__).resolve().parent
PAGES = ("names.md", "config.md")
BETWEEN = re.compile(r"(<!-- fields: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> dict[str, list[Setting]]:
    """Every table by the name that its marker gives."""
    found = {
        "per_layer_lr": [*settings(PerLayerLR, DepthSettings).values(), PRESET],
        "regions": [*settings(Region, DepthSettings).values()],
        "patterns": [*settings(PatternRule).values()],
        "rfdetr": [*settings(RfdetrPreset).values()],
        # The trainer requires model_type, so its own declaration comes last and holds.
        "config": [*settings(Config, RunOptions).values()],
        "memory.stagehand": [*settings(StreamPolicy).values()],
    }
    for name, block in BLOCKS.items():
        found[name] = [*settings(block).values()]
    return found


def markdown(rows: list[Setting]) -> str:
    """One table: field, what it allows, default, meaning."""
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        value = f"{row.check.allowed}; {row.unit}" if row.unit else row.check.allowed
        default = row.default or "required"
        cells = [f"`{row.key}`", value, default, row.doc]
        # A bar inside a cell would end it.
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def filled(page: str) -> str:
    """A page's text with its tables as the code declares them now."""
    known = tables()

    def table(match: re.Match[str]) -> str:
        return match[1] + markdown(known[match[2]]) + match[3]

    return BETWEEN.sub(table, (DOCS / page).read_text(encoding="utf-8"))


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(filled(name), encoding="utf-8")
