"""The per_layer_lr block: defaults, presets, and one clear error for every value that cannot be
meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_layerlr import ConfigError, build_plan
from dist_layerlr.errors import ModelSourceError, UnmatchedParams
from dist_layerlr.plan import load_config

MODEL = {
    f"blocks.{i}.{part}.weight": (4, 4)
    for i in range(3)
    for part in ("attn1.to_q", "attn2.to_q", "ffn.net.0")
}
MODEL |= {f"blocks.{i}.norm1.weight": (4,) for i in range(3)} | {"proj_out.weight": (4, 4)}
NAN, INF = float("nan"), float("inf")
SEED_RATES = {"self_attn": 4e-4, "cross_attn": 2e-4, "ffn": 3e-4, "norm": 5e-5}


def read(block: object, **more: object):
    return load_config({"per_layer_lr": block, **more})


def plan(block: dict, **more: object):
    return build_plan(
        MODEL, {"per_layer_lr": {"enabled": True, "unmatched": "default", **block}, **more}
    )


def refused(action, *parts: str) -> str:
    """The message of the ConfigError that ``action`` raises; it is one line and holds every
    part."""
    with pytest.raises(ConfigError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    return message


LR = (-1e-4, NAN, INF, "0.1", None, True, [1])
UNIT = (1.3, -0.1, NAN, "0.3", None, True)
RATE = (0, 0.0, 1.3, -0.5, NAN, "0.8")
TABLE = (0.5, [], [1.0], [1.0, -0.1], [1.0, NAN], "1,2", {"0": 1})
LIST = ({}, "blocks", [1], [[]])
BAD_VALUES = {
    "enabled": ((1, "true", None), "true or false"),
    "component_lr": ((1e-4, [1e-4], "self_attn", None), "a JSON object"),
    "component_lr.ffn": (LR, "a finite number >= 0"),
    "default_lr": (LR, "a finite number >= 0"),
    "depth_strategy": (
        ("liner", "Linear", 1, None, ["linear"]),
        "one of linear, cosine, inverted_u, flat, table, layer_decay",
    ),
    "min_depth_factor": (UNIT, "a number in [0, 1]"),
    "peak_position": (UNIT, "a number in [0, 1]"),
    "layer_decay": (RATE, "a number in (0, 1]"),
    "depth_table": (TABLE, "numbers in [0, 1]|a number in [0, 1]"),
    "depth_scope": (("global", 1, None), "one of stack, trunk"),
    "convention": (("deit", 3), "one of seed, rfdetr, beit, dinov3, timm"),
    "num_layers": ((0, -1, 1.5, "12", True), "an integer >= 1"),
    "log_grad_norms": ((1, "yes"), "true or false"),
    "patterns": (LIST, "a list of JSON objects|a JSON object"),
    "regions": (LIST, "a list of JSON objects|a JSON object"),
    "timing": (LIST, "a list of JSON objects|a JSON object"),
    "weight_decay": (LR, "a finite number >= 0"),
    "no_decay": (("ndim<=1", {}, [1], [""]), "a list of strings|a non-empty string"),
    "lora_plus_ratio": ((0.5, -1, NAN, "16"), "a finite number >= 1"),
    "unmatched": (("ignore", True), "one of default, warn, error"),
    "resume_lr": (("config", 0), "one of plan, checkpoint"),
    "preset": (("style", 1, ["style_lora"]), "one of style_lora, subject_lora"),
}
CASES = [
    (field, value, allowed) for field, (values, allowed) in BAD_VALUES.items() for value in values
]


@pytest.mark.parametrize(
    ("field", "value", "allowed"), CASES, ids=[f"{f}={v!r}" for f, v, _ in CASES]
)
def test_a_bad_value_names_the_field_the_value_and_what_is_allowed(
    field: str, value: object, allowed: str
):
    key, _, inner = field.partition(".")
    message = refused(
        lambda: read({key: {inner: value} if inner else value}), f"per_layer_lr.{field}"
    )
    assert any(text in message for text in allowed.split("|"))
    shown = value[-1] if isinstance(value, list) and value and repr(value) not in message else value
    assert repr(shown) in message


def test_every_field_of_the_specification_has_bad_values_above():
    fields = {field.partition(".")[0] for field in BAD_VALUES}
    message = refused(lambda: read({"nothing_like_it": 1}))
    allowed = message.partition("Allowed: ")[2].rstrip(".").split(", ")
    assert set(allowed) | {"preset"} == fields


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        (
            {"depth_stratgy": "linear"},
            ["Unknown key 'depth_stratgy'", "Did you mean 'depth_strategy'?"],
        ),
        ({"min_factor": 0.3}, ["Unknown key 'min_factor'", "min_depth_factor"]),
        (
            {"component_lr": {"self_atn": 1e-4}},
            ["'self_atn'", "per_layer_lr.component_lr", "Did you mean 'self_attn'?"],
        ),
        (
            {"regions": [{"match": "*", "multiplier": 2}]},
            ["'multiplier'", "per_layer_lr.regions[0]", "lr_multiplier"],
        ),
        (
            {"patterns": [{"match": "*", "component": "fnn"}]},
            ["'fnn'", "per_layer_lr.patterns[0]", "Did you mean 'ffn'?"],
        ),
        ({"patterns": [{"match": "*"}]}, ["per_layer_lr.patterns[0]", "'component' is missing"]),
        ({"regions": [{"lr": 1e-4}]}, ["per_layer_lr.regions[0]", "'match' is missing"]),
        ({"regions": [{"match": "re:("}]}, ["match='re:('", "not a regular expression"]),
        (
            {"regions": [{"match": "*", "lr": 1e-4, "lr_multiplier": 2}]},
            ["regions[0]", "'lr' and 'lr_multiplier' exclude"],
        ),
        (
            {"regions": [{"match": "*", "min_depth_factor": 1.3}]},
            ["regions[0].min_depth_factor=1.3", "[0, 1]"],
        ),
        (
            {"regions": [{"match": "*", "component_lr": {"fnn": 1}}]},
            ["'fnn'", "regions[0].component_lr", "'ffn'"],
        ),
        ({"depth_strategy": "table"}, ["depth_strategy='table'", "needs depth_table"]),
        ({"preset": "style_lora", "lr_encoder": 1e-4}, ["Unknown key 'lr_encoder'"]),
        ({"preset": "rfdetr", "lr_vit_layer_decay": 1.3}, ["lr_vit_layer_decay=1.3", "(0, 1]"]),
        ({"preset": "rfdetr", "lr_encoder": -1}, ["lr_encoder=-1", ">= 0"]),
        ({"preset": "rfdetr", "out_feature_indexes": []}, ["out_feature_indexes=[]", "1 or more"]),
        ([], ["per_layer_lr=[]", "a JSON object"]),
        ("linear", ["per_layer_lr='linear'", "a JSON object"]),
    ],
    ids=str,
)
def test_a_bad_block_is_refused_in_one_line(block: object, parts: list[str]):
    refused(lambda: read(block), *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"per_layer_rl": {}}, ["'per_layer_rl'", "Did you mean 'per_layer_lr'?"]),
        ({"learning_rat": 1e-4}, ["'learning_rat'", "Did you mean 'learning_rate'?"]),
        ({"learning_rate": -1}, ["learning_rate=-1", ">= 0"]),
        ({"learning_rate": "1e-4"}, ["learning_rate='1e-4'", "a finite number >= 0"]),
        ({"model_type": 3}, ["model_type=3", "a non-empty string"]),
        ({"component_lr": SEED_RATES}, ["component_lr", "inside a 'per_layer_lr' block"]),
        ({"preset": "style_lora"}, ["preset", "inside a 'per_layer_lr' block"]),
    ],
    ids=str,
)
def test_a_bad_top_level_is_refused_in_one_line(config: dict, parts: list[str]):
    refused(lambda: load_config(config), *parts)


def test_keys_of_the_trainer_are_left_alone():
    load_config(
        {"adapter": {"rank": 8}, "memory": {}, "optimizer": {"weight_decay": 0.1}, "seed": 1}
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"learning_rate": 1e-4, "learning_rate": 1e-3}', ["'learning_rate' is given twice"]),
        ('{"per_layer_lr": {"component_lr": {"ffn": 1, "ffn": 2}}}', ["'ffn' is given twice"]),
        ('{"learning_rate": }', ["not JSON"]),
        ("", ["not JSON"]),
        ("[1]", ["must hold a JSON object, got list"]),
    ],
)
def test_a_bad_file_is_refused_by_its_name(tmp_path: Path, text: str, parts: list[str]):
    path = tmp_path / "config.json"
    path.write_text(text)
    refused(lambda: load_config(path), "config.json", *parts)


def test_a_missing_or_binary_file_is_refused_by_its_name(tmp_path: Path):
    refused(lambda: load_config(tmp_path / "nowhere.json"), "nowhere.json", "No such file")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{")
    refused(lambda: load_config(str(tmp_path / "binary.json")), "binary.json", "not JSON")


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        (
            {"patterns": [{"match": "block.0", "component": "ffn"}]},
            ["patterns[0].match='block.0'", "blocks.0"],
        ),
        (
            {"patterns": [{"match": "to_q", "component": "ffn"}]},
            ["patterns[0].match='to_q'", "'*.'"],
        ),
        (
            {"regions": [{"match": "blocks", "lr": 1}, {"match": "head", "lr": 1}]},
            ["regions[1].match='head'"],
        ),
        ({"no_decay": ["*.bais"]}, ["no_decay='*.bais'", "matches no parameter"]),
        (
            {"regions": [{"match": "blocks", "no_decay": ["re:zzz"]}]},
            ["no_decay='re:zzz'", "matches no parameter"],
        ),
    ],
    ids=str,
)
def test_a_rule_that_matches_nothing_is_refused(block: dict, parts: list[str]):
    refused(lambda: plan(block), *parts)


def test_a_rule_that_an_earlier_one_hides_is_no_error():
    plan(
        {
            "patterns": [
                {"match": "blocks", "component": "ffn"},
                {"match": "blocks.0", "component": "norm"},
            ]
        }
    )


def test_duplicate_names_and_empty_models_are_refused():
    for params, text in (
        ([("a.weight", (1,)), ("a._orig_mod.weight", (1,))], "'a.weight' is listed twice"),
        ([], "no parameters"),
    ):
        with pytest.raises(ModelSourceError, match=text):
            build_plan(params, {"per_layer_lr": {"enabled": True}})


# Defaults


def rates(plan_) -> dict[str, float]:
    """{component: base LR} of a plan."""
    return {e.component: e.base_lr for e in plan_.entries.values()}


def test_without_component_lr_the_seeds_four_rates_apply():
    assert rates(plan({})) == SEED_RATES | {"default": 3e-4}


def test_component_lr_means_exactly_what_it_lists():
    assert rates(plan({"component_lr": {"self_attn": 1e-5}, "default_lr": 7e-6})) == {
        "self_attn": 1e-5,
        **dict.fromkeys(["cross_attn", "ffn", "norm", "default"], 7e-6),
    }
    assert set(rates(plan({"component_lr": {}, "default_lr": 7e-6})).values()) == {7e-6}


@pytest.mark.parametrize(("given", "expected"), [({}, 3e-4), ({"learning_rate": 2e-5}, 2e-5)])
def test_default_lr_is_the_learning_rate_or_the_seeds(given: dict, expected: float):
    assert rates(plan({"component_lr": {"ffn": 1e-3}}, **given))["default"] == expected
    assert (
        rates(plan({"component_lr": {"ffn": 1e-3}, "default_lr": 9e-5}, **given))["default"] == 9e-5
    )


@pytest.mark.parametrize(
    "block", [None, {}, {"enabled": False}, {"enabled": False, "preset": "style_lora"}]
)
@pytest.mark.parametrize(("given", "expected"), [({}, 3e-4), ({"learning_rate": 2e-5}, 2e-5)])
def test_a_block_that_is_off_is_one_flat_learning_rate(block: object, given: dict, expected: float):
    config = given if block is None else given | {"per_layer_lr": block}
    flat = build_plan(MODEL, config)
    assert {e.lr for e in flat.entries.values()} == {expected}
    assert {e.weight_decay for e in flat.entries.values()} == {None}
    assert len(flat.groups) == 1 and flat.warnings == ()


def test_a_block_that_is_off_is_still_checked():
    refused(
        lambda: build_plan(MODEL, {"per_layer_lr": {"enabled": False, "min_depth_factor": 1.3}}),
        "min_depth_factor=1.3",
    )


def test_depth_defaults_are_the_seeds():
    factors = {e.name: e.factor for e in plan({}).entries.values()}
    assert [factors[f"blocks.{i}.ffn.net.0.weight"] for i in range(3)] == pytest.approx(
        [1.0, 0.65, 0.3]
    )


# Presets


def test_a_preset_is_its_fields_and_what_stands_beside_it_wins_whole():
    got = read({"preset": "concept_lora"}).per_layer_lr
    assert (got.enabled, got.depth.depth_strategy, got.depth.min_depth_factor) == (
        True,
        "cosine",
        0.35,
    )
    assert dict(got.component_lr) == {"self_attn": 3e-4, "cross_attn": 2.5e-4, "ffn": 2e-4}
    other = read(
        {
            "preset": "concept_lora",
            "component_lr": {"ffn": 1e-5},
            "min_depth_factor": 0.5,
            "enabled": False,
        }
    )
    assert dict(other.per_layer_lr.component_lr) == {"ffn": 1e-5}
    assert (other.per_layer_lr.enabled, other.per_layer_lr.depth.min_depth_factor) == (False, 0.5)
    assert other.per_layer_lr.depth.depth_strategy == "cosine"


def test_the_rfdetr_preset_takes_the_learning_rate_and_its_own_parameters():
    block = {
        "preset": "rfdetr",
        "lr_encoder": 1e-3,
        "lr_vit_layer_decay": 0.5,
        "lr_component_decay": 0.25,
    }
    encoder, decoder = read(block, learning_rate=2e-4).per_layer_lr.regions
    assert (encoder.lr, encoder.depth.layer_decay, encoder.depth.num_layers) == (1e-3, 0.5, None)
    assert (
        decoder.lr == pytest.approx(5e-5)
        and read(block, learning_rate=2e-4).per_layer_lr.default_lr == 2e-4
    )
    live = read(
        block | {"convention": "rfdetr", "out_feature_indexes": [3, 6, 9, 12]}
    ).per_layer_lr.regions[0]
    assert live.lr == pytest.approx(1e-3 * 0.0625) and live.depth.num_layers == 13


def test_a_region_takes_the_depth_fields_that_it_does_not_give_from_the_block():
    block = {
        "depth_strategy": "cosine",
        "min_depth_factor": 0.1,
        "regions": [{"match": "*", "peak_position": 0.2}],
    }
    depth = read(block).per_layer_lr.regions[0].depth
    assert (depth.depth_strategy, depth.min_depth_factor, depth.peak_position) == (
        "cosine",
        0.1,
        0.2,
    )


def test_a_config_round_trips_through_json_and_loads_once(tmp_path: Path):
    raw = {
        "model_type": "wan",
        "learning_rate": 1e-4,
        "per_layer_lr": {"enabled": True, "component_lr": SEED_RATES},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    assert load_config(path) == load_config(str(path)) == load_config(raw)
    assert load_config(load_config(raw)) == load_config(raw)


def test_unmatched_error_names_the_parameters_and_the_ways_out():
    with pytest.raises(UnmatchedParams, match=r"1 parameters.*proj_out\.weight.*pattern"):
        plan({"unmatched": "error"})
    plan({"unmatched": "error", "regions": [{"match": "proj_out", "lr": 1e-5}]})
    plan({"unmatched": "error", "component_lr": {**SEED_RATES, "head": 1e-5}})
