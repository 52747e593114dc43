"""Write the JSON Schema of a training config from the declared fields, for editors and for the CLI.

    python docs/config_schema.py

It accepts what ``launch/train.py`` accepts, and refuses unknown keys, wrong types and ranges. What
only the model or other files can tell stays with ``train.py``: whether a pattern matches a name,
whether a folder exists, what a dataset's own fields are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_layerlr.fields import object_schema, settings
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.plan.config import PLAN_BLOCK, PRESET, Config, PerLayerLR, Region
from dist_layerlr.plan.depth import DepthSettings
from dist_layerlr.plan.presets import PRESET_CLASSES, RfdetrPreset
from dist_layerlr.plan.timing import TimingSettings
from dist_layerlr.plan.training_config import SCHEMA_FILE
from launch.trainer.families import FAMILIES, get_family
from launch.trainer.options import BLOCKS, FULL, RunOptions

PUBLISHED = Path(__file__).resolve().parent / SCHEMA_FILE.name
Schema = dict[str, Any]


def config_schema() -> Schema:
    """The schema of a whole config."""
    schema = object_schema(Config, RunOptions)
    properties = schema["properties"]
    # A config may say null: the trainer's own default then holds.
    properties["learning_rate"]["type"] = ["number", "null"]
    properties["model_type"] = {
        "enum": sorted(FAMILIES),
        "description": properties["model_type"]["description"],
    }
    for name, cls in BLOCKS.items():
        properties[name] = object_schema(cls)
        # What is missing in a file may come from --set or --max-steps.
        properties[name].pop("required", None)
    properties["memory"]["properties"]["stagehand"] = _with(
        object_schema(StreamPolicy), enabled={"type": "boolean"}
    )
    betas = properties["optimizer"]["properties"]["betas"]
    betas["maxItems"] = 2
    betas["items"] = {"type": "number", "minimum": 0.0, "exclusiveMaximum": 1.0}
    properties[PLAN_BLOCK] = _plan_block()
    schema.pop("required", None)
    full = {"required": ["training_method"], "properties": {"training_method": {"const": FULL}}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Training config of dist_layerlr",
        **schema,
        "allOf": [
            {"if": full, "then": {"not": {"required": ["adapter"]}}},
            *_objectives(),
        ],
    }


def _plan_block() -> Schema:
    """The ``per_layer_lr`` block: its own fields, those of depth, and those of a preset."""
    block = object_schema(PerLayerLR, DepthSettings)
    block["properties"] |= {
        PRESET.key: {**PRESET.check.schema(), "description": PRESET.doc},
        **{
            k: v
            for k, v in object_schema(RfdetrPreset)["properties"].items()
            if k not in block["properties"]
        },
    }
    own = settings(RfdetrPreset).keys() - settings(PerLayerLR, DepthSettings).keys()
    (name,) = [key for key, cls in PRESET_CLASSES.items() if cls is RfdetrPreset]
    beside = {"required": [PRESET.key], "properties": {PRESET.key: {"const": name}}}
    block["dependentSchemas"] = {key: beside for key in sorted(own)}
    table = {"required": ["depth_strategy"], "properties": {"depth_strategy": {"const": "table"}}}
    block |= {"if": table, "then": {"required": ["depth_table"]}}
    regions = block["properties"]["regions"]
    regions["items"] = object_schema(Region, DepthSettings, TimingSettings)
    regions["items"]["not"] = {"required": ["lr", "lr_multiplier"]}
    return {**block, "type": ["object", "null"]}


def _objectives() -> list[Schema]:
    """The objective's fields, which follow from the family."""
    families: dict[type, list[str]] = {}
    for name in sorted(FAMILIES):
        families.setdefault(get_family(name).objective_class, []).append(name)
    rules: list[Schema] = []
    for cls, names in families.items():
        of_them = {"required": ["model_type"], "properties": {"model_type": {"enum": names}}}
        objective = object_schema(cls)
        objective.pop("required", None)
        rules.append({"if": of_them, "then": {"properties": {"objective": objective}}})
    return rules


def _with(schema: Schema, **properties: Schema) -> Schema:
    return {**schema, "properties": {**properties, **schema["properties"]}}


def text() -> str:
    """The files' contents."""
    return json.dumps(config_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    # One for the web, and one that is installed with the package.
    for path in (PUBLISHED, SCHEMA_FILE):
        path.write_text(text(), encoding="utf-8")
