"""The acceptance table: every name of the census files gets an acceptable component and the right
block."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from diffusers import PixArtTransformer2DModel

from dist_layerlr import build_plan
from tests.support import census

RFDETR = {
    "learning_rate": 1e-4,
    "per_layer_lr": {
        "enabled": True,
        "preset": "rfdetr",
        "convention": "rfdetr",
        "out_feature_indexes": [2, 5, 8, 11],
        "weight_decay": 1e-4,
    },
}


def test_the_census_is_complete():
    assert len(census.files()) == 24
    assert sum(len(census.rows(file)) for file in census.files()) == 22_527


def test_the_census_of_pixart_sigma_has_the_names_of_the_real_class():
    """Its 1024-pixel checkpoints have no embedders of resolution and aspect ratio."""
    with init_empty_weights():
        model = PixArtTransformer2DModel(
            sample_size=128,
            num_layers=28,
            attention_head_dim=72,
            num_attention_heads=16,
            cross_attention_dim=1152,
            caption_channels=4096,
            interpolation_scale=2,
            use_additional_conditions=False,
        )
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert census.shapes("pixart_sigma_1024") == shapes


@pytest.mark.parametrize("file", census.files())
def test_every_parameter_has_an_acceptable_component(file: str):
    entries = census.plan(file).entries
    assert entries.keys() == {row.name for row in census.rows(file)}
    wrong = {row.name: entries[row.name].component for row in census.rows(file)}
    wrong = {
        row.name: (wrong[row.name], set(row.accept))
        for row in census.rows(file)
        if wrong[row.name] not in row.accept
    }
    assert wrong == {}


@pytest.mark.parametrize("file", census.files())
def test_every_parameter_sits_in_its_block(file: str):
    entries = census.plan(file).entries
    wrong = {}
    for row in census.rows(file):
        entry = entries[row.name]
        place = (entry.stack, entry.block, entry.blocks)
        if not row.depth_is_free and place != (row.stack, row.block, row.blocks):
            wrong[row.name] = (place, (row.stack, row.block, row.blocks))
    assert wrong == {}


@pytest.mark.parametrize("file", census.files())
def test_every_rate_is_the_component_rate_times_the_linear_factor(file: str):
    entries, aux = census.plan(file).entries, ("refiner", "vace")
    for row in census.rows(file):
        entry = entries[row.name]
        trunk = row.stack is not None and not any(word in row.stack for word in aux)
        x = row.block / (row.blocks - 1) if trunk and row.blocks > 1 else 0.0
        rate = census.RATES.get(entry.component, census.DEFAULT_LR)
        assert entry.lr == pytest.approx(rate * (1.0 - x * 0.7), rel=1e-12), row.name


@pytest.mark.parametrize("file", [file for file in census.files() if file.endswith(".kohya")])
def test_a_flattened_name_trains_like_its_peft_twin(file: str):
    base = census.base_of(file)
    flat, dotted = census.plan(file).entries, census.plan(f"{base}.lora").entries
    rows = census.table(file)
    assert {row["peft_name"] for row in rows} == dotted.keys()
    for row in rows:
        mine, twin = flat[row["name"]], dotted[row["peft_name"]]
        assert (mine.cell, mine.lr, mine.shape) == (twin.cell, twin.lr, twin.shape)


def test_rfdetr_preset_gives_the_live_library_its_own_numbers():
    rows = census.table("rfdetr_base.rfdetr_lr")
    entries = build_plan(census.shapes("rfdetr_base"), RFDETR).entries
    assert len(rows) == len(entries) == 487
    for row in rows:
        entry = entries[row["name"]]
        assert entry.lr == pytest.approx(float(row["lr_library"]), rel=1e-5), row["name"]
        default = (
            row["weight_decay_library"] == "default"
        )  # the optimizer's, which the library's configs set to 1e-4
        assert entry.weight_decay == (1e-4 if default else float(row["weight_decay_library"])), row[
            "name"
        ]


def test_rfdetr_preset_leaves_weight_decay_to_the_optimizer_unless_told():
    block = {key: value for key, value in RFDETR["per_layer_lr"].items() if key != "weight_decay"}
    entries = build_plan(census.shapes("rfdetr_base"), RFDETR | {"per_layer_lr": block}).entries
    for row in census.table("rfdetr_base.rfdetr_lr"):
        expected = 0.0 if row["weight_decay_library"] == "0.0" else None
        assert entries[row["name"]].weight_decay == expected, row["name"]


def test_rfdetr_seed_convention_is_the_quoted_rule_on_the_library_names():
    """The seed's formula with its own numbers; layer ids as the library gives them, for 12
    layers."""
    config = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True, "preset": "rfdetr"}}
    entries = build_plan(census.shapes("rfdetr_base"), config).entries
    ids = "layer_id_library_rule(.layer./embeddings)"
    for row in census.table("rfdetr_base.rfdetr_lr"):
        encoder = 1.5e-4 * 0.8 ** (13 - int(row[ids])) if row[ids] != "-" else None
        expected = {"backbone": encoder, "decoder": 7e-5, "other": 1e-4}[row["group"]]
        assert entries[row["name"]].lr == pytest.approx(expected, rel=1e-12), row["name"]
