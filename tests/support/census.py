"""Census files: every parameter name of real models, with the component and the block that each
belongs to.

``<model>.tsv.gz`` lists a real-size model, ``<model>.lora.tsv.gz`` its LoRA tensors,
``<model>.kohya.tsv.gz`` the same under flattened names. Columns: name, shape, stack, block_idx,
block_count (per stack), expected, accept (acceptable components, ``other`` meaning that no rule
names the parameter), detail, trunk_idx, trunk_count (one depth over the trunk in forward order),
seed_literal, seed_literal_cross_first (what the seed's patterns say as raw substrings).
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dist_layerlr import build_plan
from dist_layerlr.plan.entries import Plan

FOLDER = Path(__file__).parent.parent / "census"
UNETS = ("sd15", "sdxl")
"""Models whose depth is one ordered stack: their block and count are the trunk columns."""

RATES = {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5}
DEFAULT_LR = 1e-4
CONFIG = {
    "per_layer_lr": {
        "enabled": True,
        "component_lr": RATES,
        "default_lr": DEFAULT_LR,
        "unmatched": "default",
    },
}
"""All four components named, linear depth."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a census file; ``-`` is None."""

    name: str
    shape: Shape
    stack: str | None
    block: int | None
    blocks: int | None
    accept: frozenset[str]
    """`default` where the file says `other`."""
    seed_literal: str
    """Component by the seed's patterns as raw substrings, cross attention first; `default` for
    `other`."""
    detail: str

    @property
    def depth_is_free(self) -> bool:
        """Whether the file does not say where the parameter sits."""
        return self.stack == "ambiguous"


def files() -> list[str]:
    """Every census file that labels components, without the ending."""
    return sorted(
        p.name.removesuffix(".tsv.gz") for p in FOLDER.glob("*.tsv.gz") if "rfdetr_lr" not in p.name
    )


def base_of(file: str) -> str | None:
    """The full model of an adapter's file."""
    return file.partition(".")[0] if "." in file else None


@cache
def table(file: str) -> tuple[dict[str, str], ...]:
    """The raw rows of any census file."""
    with gzip.open(FOLDER / f"{file}.tsv.gz", "rt", encoding="utf-8") as lines:
        header = next(lines).rstrip("\n").split("\t")
        return tuple(
            dict(zip(header, line.rstrip("\n").split("\t"), strict=True)) for line in lines
        )


@cache
def rows(file: str) -> tuple[Row, ...]:
    """The rows of a component file."""
    unet = file.partition(".")[0] in UNETS
    return tuple(_row(raw, "trunk" if unet else "block") for raw in table(file))


def shapes(file: str) -> dict[str, Shape]:
    """``{name: shape}`` as ``build_plan`` takes it."""
    return {raw["name"]: _shape(raw["shape"]) for raw in table(file)}


@cache
def plan(file: str) -> Plan:
    """The plan of a file under ``CONFIG``, an adapter's against its base."""
    base = base_of(file)
    return build_plan(shapes(file), CONFIG, base=shapes(base) if base else None)


def _row(raw: dict[str, str], depth: str) -> Row:
    return Row(
        name=raw["name"],
        shape=_shape(raw["shape"]),
        stack=None if raw["stack"] == "-" else raw["stack"],
        block=_integer(raw[f"{depth}_idx"]),
        blocks=_integer(raw[f"{depth}_count"]),
        accept=frozenset(_label(label) for label in raw["accept"].split("|")),
        seed_literal=_label(raw["seed_literal_cross_first"]),
        detail=raw["detail"],
    )


def _shape(text: str) -> Shape:
    return tuple(int(part) for part in text.split("x")) if text not in ("", "-") else ()


def _integer(text: str) -> int | None:
    return None if text == "-" else int(text)


def _label(text: str) -> str:
    return "default" if text == "other" else text
