"""Names: wrappers undone by whole segments, adapters looked through, flattened spellings found in
the base model."""

from __future__ import annotations

import random

import pytest

from dist_layerlr import build_plan
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.plan import canonical_name
from dist_layerlr.plan.names import module_index, natural_key, parse, strip_common_module
from dist_layerlr.plan.patterns import compile_pattern
from tests.support import census

CONFIG = census.CONFIG


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.attn.to_q.weight", "blocks.0.attn.to_q.weight"),
        ("_orig_mod.blocks.0.attn.to_q.weight", "blocks.0.attn.to_q.weight"),
        (
            "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.attn.to_q.weight",
            "blocks.0.attn.to_q.weight",
        ),
        (
            "blocks.0._checkpoint_wrapped_module._orig_mod.attn.to_q.weight",
            "blocks.0.attn.to_q.weight",
        ),
        (
            "base_model.model.blocks.0.attn.to_q.lora_A.default.weight",
            "blocks.0.attn.to_q.lora_A.default.weight",
        ),
        ("_orig_mod.base_model.model.blocks.0.x", "blocks.0.x"),
        ("base_model.model.base_model.model.x", "base_model.model.x"),
        # A user's own names that only look like a wrapper's.
        ("module.blocks.0.weight", "module.blocks.0.weight"),
        ("submodule.blocks.0.weight", "submodule.blocks.0.weight"),
        ("blocks.0.module.weight", "blocks.0.module.weight"),
        ("text_module.layers.1.weight", "text_module.layers.1.weight"),
        ("model.base_model.model.x", "model.base_model.model.x"),
        ("base_model.blocks.0.weight", "base_model.blocks.0.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("blocks._fsdp_wrapped_modules.weight", "blocks._fsdp_wrapped_modules.weight"),
        ("scale_shift_table", "scale_shift_table"),
    ],
)
def test_canonical_name_undoes_wrappers_and_nothing_else(name: str, expected: str):
    assert canonical_name(name) == expected


def test_wrappers_at_random_places_are_undone():
    rng = random.Random(0)
    names = [row.name for row in rng.sample(census.rows("flux1_dev"), 100)]
    for name in names:
        segments = name.split(".")
        for wrapper in rng.choices(
            ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"], k=4
        ):
            segments.insert(rng.randrange(len(segments)), wrapper)
        assert canonical_name(".".join(segments)) == name
        assert canonical_name(canonical_name(name)) == name


@pytest.mark.parametrize(
    ("name", "owner", "leaf", "adapter", "lora_b"),
    [
        ("blocks.0.attn.to_q.weight", "blocks.0.attn.to_q", "weight", False, False),
        ("scale_shift_table", "", "scale_shift_table", False, False),
        ("blocks.0.attn.to_q.base_layer.weight", "blocks.0.attn.to_q", "weight", False, False),
        ("blocks.0.attn.to_q.lora_A.default.weight", "blocks.0.attn.to_q", "lora_A", True, False),
        ("blocks.0.attn.to_q.lora_B.default.weight", "blocks.0.attn.to_q", "lora_B", True, True),
        (
            "blocks.0.attn.to_q.lora_A.style_norm.weight",
            "blocks.0.attn.to_q",
            "lora_A",
            True,
            False,
        ),
        ("blocks.0.attn.to_q.lora_B.ff_attn2.weight", "blocks.0.attn.to_q", "lora_B", True, True),
        ("blocks.0.attn.to_q.lora_down.weight", "blocks.0.attn.to_q", "lora_down", True, False),
        ("blocks.0.attn.to_q.lora_up.weight", "blocks.0.attn.to_q", "lora_up", True, True),
        ("embed.lora_embedding_A.default", "embed", "lora_embedding_A", True, False),
        ("embed.lora_embedding_B.default", "embed", "lora_embedding_B", True, True),
        (
            "b.to_q.lora_magnitude_vector.default.weight",
            "b.to_q",
            "lora_magnitude_vector",
            True,
            False,
        ),
        ("b.to_q.lokr_w1.default", "b.to_q", "lokr_w1", True, False),
        ("b.to_q.hada_w1_a.default", "b.to_q", "hada_w1_a", True, False),
        ("b.to_q.oft_R.default.weight", "b.to_q", "oft_R", True, False),
        ("b.to_q.vera_lambda_b.default", "b.to_q", "vera_lambda_b", True, False),
        ("b.to_q.ia3_l.default", "b.to_q", "ia3_l", True, False),
        ("proj_out.modules_to_save.default.weight", "proj_out", "weight", False, False),
        ("proj_out.original_module.weight", "proj_out", "weight", False, False),
        ("module.blocks.0.to_q.weight", "module.blocks.0.to_q", "weight", False, False),
        ("submodule.lin.weight", "submodule.lin", "weight", False, False),
        ("blocks$$0$$attn$$to_q.lora_A.weight", "blocks.0.attn.to_q", "lora_A", True, False),
    ],
)
def test_parse_finds_the_base_module(name: str, owner: str, leaf: str, adapter: bool, lora_b: bool):
    path = parse(name)
    assert (".".join(path.owner), path.leaf, path.is_adapter, path.is_lora_b) == (
        owner,
        leaf,
        adapter,
        lora_b,
    )


@pytest.mark.parametrize("prefix", ["bone_encoder", "road_net", "miss_token_embedder", "hra_tower"])
def test_a_module_that_is_called_like_an_adapter_is_still_a_module(prefix: str):
    path = parse(f"model.{prefix}.layers.0.self_attn.q_proj.weight")
    assert (path.owner[1], path.leaf, path.is_adapter) == (prefix, "weight", False)


def test_an_adapters_own_name_decides_nothing():
    for adapter in ("default", "style_norm", "attn2", "ff", "lora_A", "module"):
        names = {
            f"blocks.{i}.{m}.lora_A.{adapter}.weight": (8, 64)
            for i in range(2)
            for m in ("attn1.to_q", "ffn.net.2")
        }
        entries = build_plan(names, CONFIG).entries
        assert [e.component for e in entries.values()] == ["self_attn", "ffn"] * 2


# Flattened spellings


def flatten(name: str, style: str) -> str:
    """`a.b.lora_A.weight` as kohya or ai-toolkit writes it."""
    module, _, rest = name.partition(".lora_")
    side = {"A": "down", "B": "up"}[rest[0]]
    if style == "kohya":
        return f"lora_unet_{module.replace('.', '_')}.lora_{side}.weight"
    return (
        f"lora_transformer_{module.replace('.', '_')}.lora_{side}.weight"
        if style == "musubi"
        else (f"{module.replace('.', '$$')}.lora_{rest[0]}.weight")
    )


@pytest.mark.parametrize("style", ["kohya", "musubi", "aitoolkit"])
@pytest.mark.parametrize("model", ["sd15", "flux2_klein_4b", "z_image", "sd35_medium"])
def test_every_flattened_adapter_name_is_found_in_its_base(model: str, style: str):
    base = census.shapes(model)
    dotted = census.plan(f"{model}.lora").entries
    twins = {flatten(name, style): name for name in dotted}
    assert len(twins) == len(dotted)
    flat = build_plan(
        {name: dotted[twin].shape for name, twin in twins.items()}, CONFIG, base=base
    ).entries
    assert all(
        (flat[name].cell, flat[name].lr) == (dotted[twin].cell, dotted[twin].lr)
        for name, twin in twins.items()
    )


@pytest.mark.parametrize(
    "prefix", ["transformer.", "unet.", "diffusion_model.", "model.diffusion_model."]
)
def test_a_pipeline_prefix_is_dropped_when_the_base_does_not_have_it(prefix: str):
    base = census.shapes("z_image")
    bare = census.plan("z_image.lora").entries
    names = {prefix + name: shape for name, shape in census.shapes("z_image.lora").items()}
    entries = build_plan(names, CONFIG, base=base).entries
    assert all(
        (entries[prefix + name].cell, entries[prefix + name].lr) == (e.cell, e.lr)
        for name, e in bare.items()
    )


def test_a_prefix_that_the_base_has_is_kept():
    base = {
        f"{m}.blocks.{i}.attn1.to_q.weight": (4, 4)
        for m in ("transformer", "transformer_2")
        for i in range(3)
    }
    lora = {f"transformer_2.blocks.{i}.attn1.to_q.lora_A.weight": (2, 4) for i in range(3)}
    entries = build_plan(lora, CONFIG, base=base).entries
    assert {e.stack for e in entries.values()} == {"transformer_2.blocks"}


def test_flattened_names_without_a_base_or_of_another_model_are_refused():
    kohya = {"lora_unet_blocks_0_attn1_to_q.lora_down.weight": (4, 64)}
    with pytest.raises(ModelSourceError, match=r"flattened \(kohya\).*--base"):
        build_plan(kohya, CONFIG)
    with pytest.raises(ModelSourceError, match="the base model does not have"):
        build_plan(kohya, CONFIG, base=census.shapes("z_image"))


def test_dotted_adapter_names_of_another_model_are_refused_like_flattened_ones():
    lora = {"transformer_blocks.0.attn.to_q.lora_A.weight": (4, 64)}
    with pytest.raises(ModelSourceError, match="the base model does not have"):
        build_plan(lora, CONFIG, base=census.shapes("z_image"))


def test_an_adapter_of_one_model_is_not_lost_in_a_base_of_two():
    """Wan 2.2's pipeline has two transformers: bare names fit both, and must not fall to default_lr
    unsaid."""
    base = {
        f"{m}.blocks.{i}.attn1.to_q.weight": (4, 4)
        for m in ("transformer", "transformer_2")
        for i in range(3)
    }
    with pytest.raises(ModelSourceError, match="the base model does not have"):
        build_plan({"blocks.0.attn1.to_q.lora_A.weight": (2, 4)}, CONFIG, base=base)


def test_a_module_of_another_part_is_not_taken_for_a_namesake_in_the_base():
    base = {f"blocks.{i}.attn1.to_q.weight": (4, 4) for i in range(2)} | {
        "norm_out.linear.weight": (4, 4)
    }
    with pytest.raises(ModelSourceError, match="the base model does not have"):
        build_plan({"blocks.9.extra.norm_out.linear.lora_A.weight": (2, 4)}, CONFIG, base=base)


def test_the_module_index_knows_both_spellings():
    index = module_index([parse("a.b_c.0.weight"), parse("a_b.c.weight")])
    assert index["a.b_c.0"] == index["a_b_c_0"] == ("a", "b_c", "0")
    assert index["a_b.c"] == ("a_b", "c")


# PEFT's copies


def test_peft_copies_share_the_place_of_the_module_they_copy():
    model = {
        f"blocks.{i}.attn1.to_q.{part}": (4, 4)
        for i in range(2)
        for part in ("base_layer.weight", "lora_A.x.weight")
    }
    model |= {
        "blocks.1.norm1.original_module.weight": (4,),
        "blocks.1.norm1.modules_to_save.x.weight": (4,),
    }
    entries = build_plan(model, CONFIG).entries
    assert entries["blocks.1.norm1.modules_to_save.x.weight"].cell == ("blocks", 1, "norm")
    assert {e.component for n, e in entries.items() if "to_q" in n} == {"self_attn"}


def test_a_peft_model_plans_like_its_plain_names():
    plain = census.plan("z_image.lora")
    prefixed = {
        f"base_model.model.{name}": shape for name, shape in census.shapes("z_image.lora").items()
    }
    assert build_plan(prefixed, CONFIG, base=census.shapes("z_image")).digest == plain.digest


# Order and prefixes


def test_natural_order_puts_two_before_ten():
    names = ["blocks.10.a", "blocks.2.a", "blocks.a", "a", "a2b10", "a2b9", ""]
    assert sorted(names, key=natural_key) == [
        "",
        "a",
        "a2b9",
        "a2b10",
        "blocks.2.a",
        "blocks.10.a",
        "blocks.a",
    ]


def test_ddps_prefix_is_dropped_only_where_every_name_has_it():
    assert strip_common_module(["module.a", "module.module.b"]) == ["a", "module.b"]
    assert strip_common_module(["module.a", "b"]) == ["module.a", "b"]
    assert strip_common_module(["modules.a"]) == ["modules.a"]
    assert strip_common_module([]) == []


# Patterns


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        (
            "blocks.0",
            ["blocks.0", "blocks.0.attn.w"],
            ["blocks.01.w", "blocks.00", "my.blocks.0.w", "blocks"],
        ),
        ("*.bias", ["a.bias", "a.b.bias"], ["bias", "a.bias_table"]),
        ("**.bias", ["bias", "a.b.bias"], ["a.xbias"]),
        ("blocks.*.attn", ["blocks.3.attn.to_q.w", "blocks.3.x.attn.w"], ["blocks.attn.w"]),
        ("blocks.[0-3]", ["blocks.2.w"], ["blocks.4.w", "blocks.12.w"]),
        ("blocks.[!0]", ["blocks.1.w"], ["blocks.0.w"]),
        ("blocks.1?", ["blocks.12.w"], ["blocks.1.w", "blocks.123.w"]),
        ("*.to_*", ["b.to_q.w", "b.to_out.0.w"], ["to_q.w", "b.xto_q"]),
        ("a.b+c", ["a.b+c.w"], ["a.bbc.w"]),
        ("re:to_[qk]", ["x.to_q.w", "to_k"], ["to_v"]),
        ("re:^a$", ["a"], ["ab"]),
    ],
)
def test_patterns_match_whole_segments(pattern: str, hits: list[str], misses: list[str]):
    matches = compile_pattern(pattern)
    assert [n for n in hits if not matches(n)] == [] and [n for n in misses if matches(n)] == []
