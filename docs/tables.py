"""Write the tables of the docs: config fields from their declarations, optimizers from trials.

    python docs/tables.py

A table stands between ``<!-- fields: NAME -->``, ``<!-- optimizers -->`` or ``<!-- kinds -->``, and
``<!-- end -->``; what the evidence page knows, in docs/guides.md, after ``<!-- known: NAMES -->``.
Optimizers of packages that are not installed keep the row that was written where they were.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from dist_layerlr.audit.findings import FAULTS, KINDS
from dist_layerlr.fields import Setting, settings
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.optim.trial import remember, try_way
from dist_layerlr.optim.ways import Cut, Way
from dist_layerlr.plan.config import PRESET, Config, PatternRule, PerLayerLR, Region
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.optimizers import OptimizerRule
from dist_layerlr.plan.presets import RfdetrPreset
from dist_layerlr.plan.steer import Changes, Scaled
from dist_layerlr.plan.timing import OwnSchedule, TimingRule, TimingSettings, Unfreeze
from dist_layerlr.plan.width import WidthScaling
from dist_layerlr.report.evidence import MEASURED
from dist_layerlr.sharders import Layout
from launch.trainer.objectives.causal_lm import NextToken
from launch.trainer.objectives.classes import Classification
from launch.trainer.objectives.detection import Detection
from launch.trainer.objectives.experts import ExpertFlow
from launch.trainer.objectives.flow import FlowMatching
from launch.trainer.objectives.noise import NoisePrediction
from launch.trainer.objectives.streams import AudioVideoFlow
from launch.trainer.options import BLOCKS, RunOptions
from launch.trainer.steering import Orders
from launch.trainer.validation_options import EarlyStop
from tests.support.optimizers import PACKAGES, Make, is_installed, package_of

DOCS = Path(__file__).resolve().parent
PAGES = ("names.md", "config.md", "offload.md", "steering.md")
PROOF = DOCS / "proof.md"
AUDIT = DOCS / "audit.md"
GUIDES = DOCS / "guides.md"
KNOWN = re.compile(r"(<!-- known: ([^>]*?) -->\n)(?:.*?)(<!-- end -->)", re.DOTALL)
FOUND = re.compile(r"(<!-- kinds -->\n)(.*?)(<!-- end -->)", re.DOTALL)
OPTIMIZERS = re.compile(r"(<!-- optimizers -->\n)(.*?)(<!-- end -->)", re.DOTALL)
WAYS = {
    "none, DDP": Layout(name="ddp"),
    "FSDP2, segmented": Layout(name="fsdp2", shards=True),
    "FSDP1": Layout(name="fsdp1", shards=True),
    "FSDP1 flat; ZeRO 1, 2 segmented": Layout(name="fsdp1_flat", shards=True, flat=True),
    "ZeRO 1, 2 groups": Layout(name="zero", stage=2, shards=True, flat=True),
    "ZeRO 3 groups": Layout(name="zero", stage=3, shards=True, flat=True),
}
"""The columns of the table of optimizers."""
BETWEEN = re.compile(r"(<!-- fields: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> dict[str, list[Setting]]:
    """Every table by the name that its marker gives."""
    found = {
        "per_layer_lr": [*settings(PerLayerLR, DepthSettings).values(), PRESET],
        "regions": [*settings(Region, DepthSettings, TimingSettings).values()],
        "timing": [*settings(TimingRule, TimingSettings).values()],
        "timing.schedule": [*settings(OwnSchedule).values()],
        "timing.unfreeze": [*settings(Unfreeze).values()],
        "patterns": [*settings(PatternRule).values()],
        "optimizers": [*settings(OptimizerRule).values()],
        "width_scaling": [*settings(WidthScaling).values()],
        "rfdetr": [*settings(RfdetrPreset).values()],
        # The trainer requires model_type, so its own declaration comes last and holds.
        "config": [*settings(Config, RunOptions).values()],
        "memory.stagehand": [*settings(StreamPolicy).values()],
        "steer": [*settings(Changes, Orders).values()],
        "steer.scale": [*settings(Scaled).values()],
        "train.early_stop": [*settings(EarlyStop).values()],
    }
    flow = settings(FlowMatching)
    found["objective.flow"] = [*flow.values()]
    # What two families of clips add to flow matching.
    for name, cls in (("wan22", ExpertFlow), ("ltx2", AudioVideoFlow)):
        more = settings(cls)
        found[f"objective.{name}"] = [more[key] for key in more if key not in flow]
    found["objective.next_token"] = [*settings(NextToken).values()]
    found["objective.classes"] = [*settings(Classification).values()]
    found["objective.detection"] = [*settings(Detection).values()]
    found["objective.noise"] = [*settings(NoisePrediction).values()]
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


def optimizer_rows() -> dict[str, str]:
    """{optimizer: its row}, tried here and now, of what is installed."""
    rows: dict[str, str] = {}
    for name, make in PACKAGES.items():
        if is_installed(package_of(name)):
            cells = [_cell(make, column, layout) for column, layout in WAYS.items()]
            rows[name] = f"| {name} | " + " | ".join(cells) + " |"
    return rows


def _cell(make: Make, column: str, layout: Layout) -> str:
    params = [nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(6))]
    try:
        optimizer = make([{"params": params, "lr": 1e-3, "name": "all"}])
    except Exception:
        return "refused"  # by its own constructor, as LBFGS refuses groups
    remember(optimizer, make)
    shapes = [(6, 6), (6,)]
    way = Way.of(layout, params, len(shapes), segmented=layout.name == "fsdp1_flat")
    if layout.name == "fsdp2":
        way = Way(cut=Cut.ROWS, dims=(0,))
    verdict = try_way(optimizer, way, params, shapes)
    if verdict.fault is not None:
        return "refused"
    return "exact" if verdict.tried else "not tried"


def optimizer_table(written: str) -> str:
    """The table, with the written rows of what is not installed."""
    old = {line.split("|")[1].strip(): line for line in written.splitlines()[2:]}
    new = optimizer_rows()
    head = ["| optimizer | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]
    rows = [new.get(name, old.get(name)) for name in PACKAGES]
    return "\n".join([*head, *(row for row in rows if row)]) + "\n"


def filled_proof() -> str:
    """docs/proof.md with its table as trials give it now."""
    text = PROOF.read_text(encoding="utf-8")
    return OPTIMIZERS.sub(lambda found: found[1] + optimizer_table(found[2]) + found[3], text)


def filled_audit() -> str:
    """docs/audit.md with the kinds that the audit finds."""
    rows = "| kind | counts as | meaning |\n|---|---|---|\n"
    for kind, meaning in KINDS.items():
        rows += f"| `{kind}` | {'fault' if kind in FAULTS else 'warning'} | {meaning} |\n"
    return FOUND.sub(lambda found: found[1] + rows + found[3], AUDIT.read_text(encoding="utf-8"))


def filled_guides() -> str:
    """docs/guides.md with what is known of each choice that it names."""

    def known(found: re.Match[str]) -> str:
        names = found[2].split(", ")
        rows = [f"- `{name}`: {MEASURED.get(name, 'not measured')}.\n" for name in names]
        return found[1] + "".join(rows) + found[3]

    return KNOWN.sub(known, GUIDES.read_text(encoding="utf-8"))


if __name__ == "__main__":
    GUIDES.write_text(filled_guides(), encoding="utf-8")
    AUDIT.write_text(filled_audit(), encoding="utf-8")
    PROOF.write_text(filled_proof(), encoding="utf-8")
    for name in PAGES:
        (DOCS / name).write_text(filled(name), encoding="utf-8")
