"""The config's ``adapter`` block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_layerlr import fields
from dist_layerlr.fields import setting

LORA, DORA = "lora", "dora"


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A PEFT LoRA or DoRA adapter."""

    kind: str = setting(
        fields.one_of(lambda: (LORA, DORA)),
        default=LORA,
        key="type",
        doc="Kind of adapter; `dora` also trains the length of each row of a weight.",
    )
    rank: int = setting(fields.integer(1), default=16, doc="Rows of lora_A.")
    alpha: float = setting(
        fields.number(0.0, open_low=True),
        default=16.0,
        shown="the rank",
        doc="The adapter's output is multiplied by alpha / rank.",
    )
    rslora: bool = setting(
        fields.boolean, default=False, doc="Multiply by alpha / sqrt(rank) instead."
    )
    dropout: float = setting(
        fields.number(0.0, 1.0),
        default=0.0,
        doc="Share of the adapter's inputs that are zeroed. Which ones depends on the seed and the"
        " microbatch's samples.",
    )
    target_modules: tuple[str, ...] = setting(
        fields.strings, default=(), shown="the family's own", doc="Endings of module names."
    )
    blocks: list[int] | None = setting(
        fields.integers(at_least=1),
        default=None,
        shown="all of the model",
        doc="Adapt target modules in these blocks alone, numbered as the plan does: in each stack,"
        " over all stages of a UNet.",
    )


def read_adapter(values: dict[str, Any]) -> AdapterOptions:
    """Make the block of what a config gives, checked field by field already.

    Raises:
        ConfigError: a dropout that leaves nothing.
    """
    values.setdefault("alpha", float(values.get("rank", AdapterOptions().rank)))
    if values.get("dropout") == 1.0:
        raise fields.invalid("adapter.dropout", 1.0, "a number in [0, 1)")
    return AdapterOptions(**values)
