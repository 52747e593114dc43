"""Commands about forms of a config: convert (from other projects), schema (for editors)."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dist_layerlr.cli.command import MODEL_HELP, PROGRAM, Output, add_command, as_json
from dist_layerlr.exchange.convert import FORMATS, convert
from dist_layerlr.files import read_config
from dist_layerlr.plan.read import read_model
from dist_layerlr.plan.training_config import SCHEMA_FILE


def add_to(commands: Any) -> None:
    """Declare them."""
    command = add_command(
        commands,
        "convert",
        _run_convert,
        text="write the layer-wise rates of another project's settings as a training config",
        examples=[
            "convert kohya lora.toml --sdxl > config.json",
            "convert axolotl run.yaml --model model.safetensors",
        ],
    )
    command.add_argument("format", choices=list(FORMATS), help="whose settings FILE holds")
    command.add_argument("file", metavar="FILE", help="JSON, YAML or TOML")
    command.add_argument("--sdxl", action="store_true", help="kohya: the UNet is SDXL's")
    command.add_argument(
        "--model",
        metavar="MODEL",
        help=f"leave out patterns that match none of its names: {MODEL_HELP}",
    )
    add_command(
        commands,
        "schema",
        lambda _: (SCHEMA_FILE.read_text(encoding="utf-8"), 0),
        text="print the JSON Schema of a training config, by which editors complete and check it",
        examples=["schema > config.schema.json"],
    )


def _run_convert(args: argparse.Namespace) -> Output:
    settings = read_config(args.file)
    # A file of sd-scripts does not say which UNet it is for: its script's name does.
    if args.sdxl:
        settings["sdxl"] = True
    names = [info.name for info in read_model(args.model)] if args.model else None
    found = convert(args.format, settings, names)
    if args.json:
        return as_json({"config": found.config, "notes": list(found.notes)}), 0
    for note in found.notes:
        print(f"{PROGRAM}: note: {note}", file=sys.stderr)
    return as_json(found.config), 0
