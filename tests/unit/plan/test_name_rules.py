"""Every row of the name tables labels its own example, a parameter of a real model."""

from __future__ import annotations

import pytest

from dist_layerlr.plan import build_plan, components, layer_decay, name_rules, stacks
from dist_layerlr.plan.build import _Labeller, _siblings
from dist_layerlr.plan.entries import ParamInfo
from dist_layerlr.plan.name_rules import NameRule, NameRules, is_attention
from dist_layerlr.plan.names import parse
from dist_layerlr.plan.stacks import StackMap
from tests.support import census

TABLES = {name: value for name, value in vars(name_rules).items() if isinstance(value, NameRules)}
EMBEDDINGS = ("VIT_EMBEDDINGS", "CLASS_TOKENS", "REGISTER_TOKENS", "TIMM_EMBEDDINGS", "FINAL_NORMS")
BY_NAME_ONLY = ("STACKS", "PLAIN_STACKS", *EMBEDDINGS)
LABELS = [
    pytest.param(rule, id=f"{name} {rule.pattern.pattern}")
    for name, table in TABLES.items()
    if name not in BY_NAME_ONLY
    for rule in table.rules
]


def rows(*tables: str):
    return [
        pytest.param(name, rule, id=f"{name} {rule.pattern.pattern}")
        for name in tables
        for rule in TABLES[name].rules
    ]


def twins(example: str, *beside: str) -> list[str]:
    """A model of two blocks: the example in each of them, beside a self attention and more."""
    segments = example.split(".")
    key = next((i for i, segment in enumerate(segments) if segment.isdecimal()), None)
    if key is None:
        return [example]
    names = []
    for block in "01":
        names.append(".".join((*segments[:key], block, *segments[key + 1 :])))
        for name in ("self_attn.q_proj.weight", *beside):
            names.append(".".join((*segments[:key], block, name)))
    return names


def model_of(rule: NameRule) -> tuple[str, list[str]]:
    """The example's name in its model, and all names of that model."""
    if rule.model in census.files():
        names = [row.name for row in census.rows(rule.model)]
        assert rule.example in names, f"{rule.model} has no {rule.example}"
        return rule.example, names
    names = twins(rule.example, *(["mlp.experts.down_proj"] if rule.label == "router" else []))
    return names[0], names


def label(example: str, names: list[str], owner_class: str | None = None) -> components.Label:
    paths = [parse(name) for name in names]
    stack_map = StackMap(paths)
    locations = [stack_map.locate(path) for path in paths]
    labeller = _Labeller(_siblings(paths, locations))
    info = ParamInfo(name=example, shape=(4, 4), owner_class=owner_class)
    i = names.index(example)
    return labeller(info, paths[i], locations[i], None)


@pytest.mark.parametrize("rule", [p for p in LABELS if "NORM_CLASSES" not in p.id])
def test_the_example_of_a_component_row_is_labelled_by_that_row(rule: NameRule):
    found = label(*model_of(rule))
    if rule.label == "self_attn" and found.component == "cross_attn":
        # A word of attention that always names cross attention: it is there to find the blocks.
        owner = parse(rule.example).owner
        assert [s for s in owner if name_rules.ATTENTION.first(s) is rule]
        return
    assert found.row is rule, found
    assert rule.label in (found.component, found.fine)


@pytest.mark.parametrize(("table", "rule"), rows("NORM_CLASSES"))
def test_the_class_of_a_norm_row_makes_its_weight_a_norm(table: str, rule: NameRule):
    names = ["layers.0.final.weight", "layers.1.final.weight"]
    found = label(names[0], names, owner_class=rule.example)
    assert (found.row, found.component, found.is_norm) == (rule, "norm", True)
    assert label(names[0], names).component == "default"


@pytest.mark.parametrize(("table", "rule"), rows("STACKS", "PLAIN_STACKS"))
def test_a_stack_row_makes_a_list_without_attention_names_a_stack(
    table: str, rule: NameRule, monkeypatch
):
    example = model_of(rule)[0] if rule.model in census.files() else rule.example
    segments = example.split(".")
    key = next(i for i, segment in enumerate(segments) if segment.isdecimal())
    names = []
    for block in "01":
        names.append(".".join((*segments[:key], block, *segments[key + 1 :])))
    assert not any(is_attention(segment) for segment in segments)

    def stack_of() -> str | None:
        paths = [parse(name) for name in names]
        found = StackMap(paths).locate(paths[1])
        return found and found.stack

    assert stack_of() == ".".join(segments[:key])
    others = [other for other in TABLES[table].rules if other is not rule]
    monkeypatch.setattr(stacks, table, NameRules(*others))
    assert stack_of() != ".".join(segments[:key])


@pytest.mark.parametrize(("table", "rule"), rows(*EMBEDDINGS))
def test_the_example_of_an_embedding_row_is_hit_by_that_row(table: str, rule: NameRule):
    path = parse(model_of(rule)[0])
    hits = [TABLES[table].first(segment) for segment in (*path.owner, path.leaf)]
    assert rule in hits


@pytest.mark.parametrize("convention", layer_decay.CONVENTIONS)
def test_no_convention_decays_a_head(convention: str):
    assert layer_decay.CONVENTIONS[convention](parse("head.weight"), None, 12) == 13


ROUTERS = {
    "Qwen3-MoE": ("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    "Mixtral on disk": ("block_sparse_moe.gate.weight", "block_sparse_moe.experts.0.w1.weight"),
    "DeepSeek": ("mlp.gate.e_score_correction_bias", "mlp.experts.0.up_proj.weight"),
    "GPT-OSS": ("mlp.router.bias", "mlp.experts.down_proj_bias"),
    "HiDream": ("block.ff_i.gate.weight", "block.ff_i.experts.0.w1.weight"),
}


@pytest.mark.parametrize(("router", "expert"), ROUTERS.values(), ids=ROUTERS.keys())
def test_a_router_is_no_feed_forward_and_its_experts_are(router: str, expert: str):
    names = twins(f"layers.0.{router}", expert)
    found = label(names[0], names)
    assert (found.component, found.fine) == ("default", "router")
    assert label(f"layers.0.{expert}", names).component == "ffn"


def test_a_gate_without_experts_is_a_feed_forward():
    names = twins("layers.0.mlp.gate.weight", "mlp.up.weight")
    assert label(names[0], names).component == "ffn"


def test_a_listed_router_takes_its_own_rate_and_an_unlisted_one_the_default():
    names = twins("layers.0.mlp.gate.weight", "mlp.experts.down_proj")
    shapes = dict.fromkeys(names, (4, 4))
    for listed, wanted in (({}, 7e-4), ({"router": 1e-6}, 1e-6)):
        block = {
            "enabled": True,
            "depth_strategy": "flat",
            "component_lr": {"ffn": 3e-4, **listed},
            "default_lr": 7e-4,
        }
        entries = build_plan(shapes, {"per_layer_lr": block}).entries
        assert entries["layers.1.mlp.gate.weight"].lr == wanted
        assert entries["layers.1.mlp.experts.down_proj"].lr == 3e-4
