"""Write the tables of docs/families.md: what the plan and the memory of each published model are.

    python docs/families.py

Each table stands between ``<!-- families: NAME -->`` and ``<!-- end -->``. Models are built on the
meta device from ``launch/trainer/published.py``, so no weight is read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from dist_layerlr import plan_model
from dist_layerlr.plan import Plan
from launch.trainer.estimate import GB, Estimate, estimate
from launch.trainer.families import get_family
from launch.trainer.options import RunOptions, load_options
from launch.trainer.published import PUBLISHED
from launch.trainer.weights import empty_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
BETWEEN = re.compile(r"(<!-- families: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
RANKS, CARD_GB = 8, 80.0
TOLD = ("train.dtype=bf16", "train.checkpointing=true", "train.micro_batch=1")
"""What the memory columns assume."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def model_types() -> list[str]:
    """The diffusion families, whose configs come as a LoRA and as a full finetune."""
    return sorted(name for name, known in PUBLISHED.items() if known.class_name)


@cache
def planned(model_type: str, method: str) -> tuple[RunOptions, Plan]:
    """Plan the published model by the shipped config, as a LoRA or as a full finetune."""
    file = ROOT / "launch" / "configs" / f"{model_type}.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    told = [*TOLD, f"training_method={method}"]
    if method == "lora" and "adapter" not in raw:
        told.append('adapter={"type": "lora", "rank": 16}')
    if method == "fine_tune" and "adapter" in raw:
        file = file.with_name(f"{model_type}_full.json")
    options = load_options(file, told, outline=True)
    model = empty_model(get_family(model_type), options)
    return options, plan_model(model, options.plan)


def overview() -> str:
    """One row per family: stacks, blocks, groups, share at default_lr."""
    head = (
        "| model type | published model | parameters | stacks (blocks) | groups: LoRA, full |"
        " at default_lr, full |\n|---|---|---|---|---|---|\n"
    )
    rows = []
    for model_type in model_types():
        _, full = planned(model_type, "fine_tune")
        _, lora = planned(model_type, "lora")
        entries = full.entries.values()
        whole = sum(entry.numel for entry in entries)
        at_default = sum(e.numel for e in entries if _at_default(e))
        rows.append(
            f"| `{model_type}` | {PUBLISHED[model_type].name} | {whole / 1e9:.2f} B |"
            f" {_stacks(full)} | {len(lora.groups)}, {len(full.groups)} |"
            f" {at_default / whole:.1%} |"
        )
    return head + "\n".join(rows) + "\n"


def _at_default(entry: Any) -> bool:
    """Whether no rate of the config names the entry's component."""
    return bool(entry.component == "default")


def _stacks(plan: Plan) -> str:
    blocks: Counter[str] = Counter()
    for entry in plan.entries.values():
        if entry.stack is not None:
            blocks[entry.stack] = max(blocks[entry.stack], (entry.block or 0) + 1)
    return ", ".join(f"`{stack}` {count}" for stack, count in blocks.items())


def at_default() -> str:
    """List the names of each family that train at default_lr in a full finetune."""
    lines = []
    for model_type in model_types():
        _, full = planned(model_type, "fine_tune")
        kinds: Counter[str] = Counter()
        for entry in full.entries.values():
            if _at_default(entry):
                owner = entry.name.rsplit(".", 1)[0]
                kinds[NUMBER.sub("*", owner)] += 1
        listed = ", ".join(f"`{kind}`" for kind in kinds) or "none"
        lines.append(f"- `{model_type}`: {listed}")
    return "\n".join(lines) + "\n"


def memory() -> str:
    """One row per family: GB per rank of a LoRA and of a full finetune."""
    head = (
        f"| model type | a sample | LoRA: one card | streamed | fsdp2, {RANKS} cards |"
        f" full: fsdp2, {RANKS} cards | zero 3 | streamed |\n|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for model_type in model_types():
        lora, full = (_estimate(model_type, method) for method in ("lora", "fine_tune"))
        cells = [_gb(lora, "none"), _gb(lora, "streamed"), _gb(lora, "fsdp2")]
        cells += [_gb(full, "fsdp2"), _gb(full, "zero 3"), _gb(full, "streamed")]
        rows.append(f"| `{model_type}` | {PUBLISHED[model_type].sample} | {' | '.join(cells)} |")
    return head + "\n".join(rows) + "\n"


def _estimate(model_type: str, method: str) -> Estimate:
    options, plan = planned(model_type, method)
    return estimate(options, plan, RANKS, CARD_GB)


def _gb(found: Estimate, sharder: str) -> str:
    row = {row.sharder: row for row in found.rows}[sharder]
    if row.activations is None:
        return f"{row.total / GB:.1f} + activations"
    return f"{row.total / GB:.1f}"


TABLES = {"overview": overview, "default": at_default, "memory": memory}


def filled(text: str) -> str:
    """Return the page with its tables as the code makes them now."""
    return BETWEEN.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
