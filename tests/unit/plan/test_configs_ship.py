"""The configs and presets that ship are the seed's own: ``tests/seed_examples.json`` holds its
JSON, untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_layerlr import build_plan
from dist_layerlr.plan import load_config
from dist_layerlr.plan.presets import PRESETS
from tests.support import census

ROOT = Path(__file__).resolve().parents[3]
SEED = json.loads((ROOT / "tests" / "seed_examples.json").read_text())
SHIPPED = sorted(path.name for path in (ROOT / "launch" / "configs").glob("*.json"))
MODELS = {
    "chroma_1.json": "chroma1_hd",
    "flux_2_klein_4b.json": "flux2_klein_4b.lora",
    "hunyuan_video.json": "hunyuan_video",
    "ltx2.json": "ltx2_19b.lora",
    "pixart.json": "pixart_sigma_1024",
    "qwen.json": "qwen_image",
    "rfdetr.json": "rfdetr_base",
    "sana.json": "sana_1600m",
    "sd15.json": "sd15.lora",
    "sd35.json": "sd35_medium.lora",
    "sdxl.json": "sdxl",
    "wan.json": "wan21_i2v_14b.lora",
    "zimage.json": "z_image.lora",
}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_loads(name: str):
    config = load_config(ROOT / "launch" / "configs" / name)
    assert config.per_layer_lr.enabled and config.learning_rate and config.model_type != "model"


@pytest.mark.parametrize("name", SEED["launch/configs"])
def test_the_seeds_examples_ship_as_they_are(name: str):
    assert (
        json.loads((ROOT / "launch" / "configs" / name).read_text()) == SEED["launch/configs"][name]
    )


def test_every_family_of_the_seed_has_a_config():
    assert set(SHIPPED) >= set(SEED["launch/configs"]) | {
        "wan22.json",
        "pixart.json",
        "sana.json",
        "rfdetr.json",
    }


@pytest.mark.parametrize("name", MODELS)
def test_every_shipped_config_plans_its_real_model(name: str):
    file = MODELS[name]
    base = census.base_of(file)
    config = ROOT / "launch" / "configs" / name
    plan = build_plan(census.shapes(file), config, base=census.shapes(base) if base else None)
    block = load_config(config).per_layer_lr
    used = {e.component for e in plan.entries.values()}
    matched = used - {"default"}
    assert matched and plan.entries.keys() == {row.name for row in census.rows(file)}
    for e in plan.entries.values():
        if e.region is None:
            assert e.base_lr == block.component_lr.get(e.component, block.default_lr)
        assert 0 < e.lr <= e.base_lr


def test_the_presets_are_the_seeds_snippets():
    assert PRESETS.keys() == SEED["strategy guide"].keys()
    for name, snippet in SEED["strategy guide"].items():
        assert PRESETS[name] == {"enabled": True, **snippet}


def test_a_preset_equals_its_snippet_written_out():
    for name, snippet in SEED["strategy guide"].items():
        short = load_config({"learning_rate": 1e-4, "per_layer_lr": {"preset": name}})
        assert short == load_config(
            {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, **snippet}}
        )


def test_the_block_of_the_config_section_spells_out_the_defaults():
    block = SEED["config section"]["per_layer_lr"]
    full = load_config({"per_layer_lr": block})
    assert full == load_config({"per_layer_lr": {"enabled": True, "min_depth_factor": 0.3}})
