"""One schema, three spellings: JSON, YAML and TOML mean the same, and the published schema says
what train.py says."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dist_layerlr.errors import ConfigError
from dist_layerlr.files import read_config
from dist_layerlr.plan import load_config
from dist_layerlr.plan.training_config import SCHEMA_FILE, check_training_config
from launch.trainer.options import load_options
from tests.support.imports import ROOT

SPEC = importlib.util.spec_from_file_location("config_schema", ROOT / "docs" / "config_schema.py")
assert SPEC is not None and SPEC.loader is not None
config_schema = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(config_schema)
SHIPPED = sorted((ROOT / "launch" / "configs").glob("*.json"))
YAML = """
model_type: wan
learning_rate: 1e-4
per_layer_lr:
  enabled: true
  component_lr: {self_attn: 4e-4, ffn: 3.0E-4}
  depth_strategy: table
  depth_table: [1, .5]
  regions:
    - match: "blocks.0"
      lr_multiplier: 0.5
adapter: {type: lora, rank: 010}
"""
TOML = """
model_type = "wan"
learning_rate = 1e-4
[per_layer_lr]
enabled = true
component_lr = {self_attn = 4e-4, ffn = 3.0E-4}
depth_strategy = "table"
depth_table = [1, 0.5]
regions = [{match = "blocks.0", lr_multiplier = 0.5}]
[adapter]
type = "lora"
rank = 10
"""
SAME = {
    "model_type": "wan",
    "learning_rate": 1e-4,
    "per_layer_lr": {
        "enabled": True,
        "component_lr": {"self_attn": 4e-4, "ffn": 3e-4},
        "depth_strategy": "table",
        "depth_table": [1, 0.5],
        "regions": [{"match": "blocks.0", "lr_multiplier": 0.5}],
    },
    "adapter": {"type": "lora", "rank": 10},
}


def written(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "content"), [("a.yaml", YAML), ("a.YML", YAML), ("a.toml", TOML)], ids=str
)
def test_the_same_config_in_each_form_is_the_same(name: str, content: str, tmp_path: Path):
    path = written(tmp_path, name, content)
    assert read_config(path) == SAME
    assert load_config(path) == load_config(SAME)
    options = load_options(path, outline=True)
    assert (options.adapter.rank, options.plan) == (10, load_config(SAME))


def test_yamls_traps_are_none():
    cases = {
        "1e-4": 1e-4,
        "-1.5e+3": -1500.0,
        "1_000": "1_000",
        "no": "no",
        "on": "on",
        "1:30": "1:30",
        "2020-01-01": "2020-01-01",
        "010": 10,
        "'1e-4'": "1e-4",
        "~": None,
        ".5": 0.5,
        "true": True,
    }
    for text_, value in cases.items():
        assert _value(f"key: {text_}") == value, text_
    merged = "base: &b {x: 1, y: 2}\nkey: {<<: *b, x: 3}"
    assert _value(merged) == {"x": 3, "y": 2}


def _value(content: str) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return read_config(written(Path(folder), "a.yaml", content))["key"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.yaml", "a: {x: 1, x: 2}", "key 'x' is given twice. Keep one."),
        ("a.toml", "x = 1\nx = 2", "not TOML (Cannot overwrite a value"),
        ("a.yaml", "1: 2", "key 1 is no text. Quote it."),
        ("a.yaml", "a: [", "not YAML (while parsing"),
        ("a.yaml", "- 1", "must hold a mapping of keys, got list."),
        ("a.yaml", "a: !!python/name:os.system", "could not determine a constructor"),
        ("a.yaml", "a: 1\n---\na: 2", "expected a single document"),
        ("a.yaml", "", "got nothing. Begin with"),
        ("a.yaml", "a: !!int [1]", "expected a scalar node, but found sequence"),
        ("a.yaml", "a: !!bool {b: 1}", "expected a scalar node, but found mapping"),
        ("a.yaml", "a: !!map b", "which is no mapping"),
        # JSON has neither dates nor bytes.
        ("a.yaml", "a: !!timestamp soon", "constructor for the tag"),
        ("a.yaml", "a: !!binary aGk=", "constructor for the tag"),
    ],
)
def test_what_is_ambiguous_or_no_config_is_refused(
    name: str, content: str, says: str, tmp_path: Path
):
    with pytest.raises(ConfigError) as found:
        read_config(written(tmp_path, name, content))
    assert says in str(found.value) and str(tmp_path / name) in str(found.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.toml"])
def test_the_mark_that_windows_editors_put_before_utf_8_is_no_content(name: str, tmp_path: Path):
    content = {"a.json": '{"x": 1}', "a.yaml": "x: 1", "a.toml": "x = 1"}[name]
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_config(path) == {"x": 1}


def test_a_yaml_word_is_no_boolean_and_is_refused_by_its_field(tmp_path: Path):
    path = written(tmp_path, "a.yaml", "per_layer_lr: {enabled: yes}")
    with pytest.raises(ConfigError, match="enabled='yes': must be true or false"):
        load_config(path)


# The schema


def test_the_published_schema_is_what_the_declared_fields_say():
    for path in (config_schema.PUBLISHED, SCHEMA_FILE):
        assert path.read_text(encoding="utf-8") == config_schema.text(), "run `make docs`"


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(config_schema.text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_accepts_every_shipped_config(path: Path, validator: Any):
    validator.validate(json.loads(path.read_text(encoding="utf-8")))


BASE: dict[str, Any] = {"model_type": "wan", "per_layer_lr": {"enabled": True}}
REFUSED: dict[str, dict[str, Any]] = {
    "unknown key": {"per_layer_lrs": {}},
    "family": {"model_type": "wna"},
    "unknown key of a block": {"train": {"step": 10}},
    "no steps": {"train": {"steps": 0}},
    "boolean for a number": {"learning_rate": True},
    "text for a number": {"learning_rate": "1e-4"},
    "negative rate": {"learning_rate": -1e-4},
    "curve": {"per_layer_lr": {"depth_strategy": "linaer"}},
    "table without factors": {"per_layer_lr": {"depth_strategy": "table"}},
    "factor above 1": {"per_layer_lr": {"min_depth_factor": 1.5}},
    "region without match": {"per_layer_lr": {"regions": [{"lr": 1e-4}]}},
    "region with two rates": {
        "per_layer_lr": {"regions": [{"match": "a", "lr": 1e-4, "lr_multiplier": 2}]}
    },
    "key of another preset": {"per_layer_lr": {"lr_encoder": 1e-4}},
    "optimizer": {"optimizer": {"type": ""}},
    "betas": {"optimizer": {"betas": [0.9, 1.0]}},
    "streaming": {"memory": {"stagehand": {"window": 2}}},
    "adapter beside a full finetune": {"training_method": "fine_tune", "adapter": {"rank": 2}},
    "objective of another family": {"objective": {"label_smoothing": 0.1}},
}


@pytest.mark.parametrize("more", REFUSED.values(), ids=REFUSED)
def test_the_schema_and_train_py_refuse_the_same(
    more: dict[str, Any], validator: Any, tmp_path: Path
):
    config = {**BASE, **more}
    assert not validator.is_valid(config)
    with pytest.raises(ConfigError):
        load_options(written(tmp_path, "a.json", json.dumps(config)), outline=True)
    assert validator.is_valid(BASE)


def test_a_config_may_name_its_schema(validator: Any, tmp_path: Path):
    config = {**BASE, "$schema": "config.schema.json"}
    validator.validate(config)
    path = written(tmp_path, "a.json", json.dumps(config))
    assert load_options(path, outline=True).plan.schema == "config.schema.json"
    assert math.isfinite(load_config(path).flat_lr)


def test_the_command_line_refuses_wrong_fields_of_a_trainers_config():
    run = {"model_type": "wan", "model_path": "x", "data": {"kind": "digits"}}
    check_training_config({**run, "train": {"steps": 1}})
    with pytest.raises(ConfigError, match="'step' in train. Did you mean 'steps'"):
        check_training_config({**run, "train": {"step": 1}})
    streamed = {"memory": {"stagehand": {"enabled": True, "prefetch": 2}}, "train": {"steps": 1}}
    with pytest.raises(ConfigError, match=r"'prefetch' in memory.stagehand"):
        check_training_config({**run, **streamed})
