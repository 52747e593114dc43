"""Plans against the parameter groups that timm and RF-DETR build for their own models."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from dist_layerlr import plan_model
from dist_layerlr.plan import build_plan
from dist_layerlr.plan.entries import Plan

LR, DECAY, RATE = 1e-3, 0.05, 0.75

PLAIN = (
    "vit_base_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit3_base_patch16_224",
    "eva02_base_patch14_224",
    "beit_base_patch16_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224",
    "hiera_tiny_224",
)
STAGED = {
    "pvt_v2_b0": 178,
    "mvitv2_tiny": 242,
    "maxvit_tiny_tf_224": 458,
    "coatnet_0_rw_224": 194,
    "swin_tiny_patch4_window7_224": 17,
    "swinv2_tiny_window8_256": 21,
    "convnext_tiny": 13,
    "convnextv2_atto": 14,
    "efficientnet_b0": 28,
}
"""Nets of stages, and how many of their rates the names alone give right."""


def timm_model(name: str, **more: Any) -> Any:
    timm = pytest.importorskip("timm", reason="the extra `families` is not installed")
    with torch.device("meta"):
        return timm.create_model(name, **more)


def timm_config(model: Any, convention: str = "timm", **more: Any) -> dict[str, Any]:
    live = dict(model.named_parameters())
    # Nets without embeddings do not say which of their names timm exempts.
    named = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    exempt = sorted(name for name in named if name in live)
    block = {
        "enabled": True,
        "component_lr": {},
        "depth_strategy": "layer_decay",
        "layer_decay": RATE,
        "convention": convention,
        "weight_decay": DECAY,
        "no_decay": ["ndim<=1", *(f"re:^{re.escape(n)}$" for n in exempt)],
        "unmatched": "default",
        **more,
    }
    return {"learning_rate": LR, "per_layer_lr": block}


def groups_of_timm(model: nn.Module) -> dict[str, tuple[float, float]]:
    """{name: (lr_scale, weight decay)} as timm's own optimizer has them."""
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=DECAY, layer_decay=RATE)
    found: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            found[id(param)] = (group["lr_scale"], group["weight_decay"])
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def scale(plan: Plan, name: str) -> float:
    return plan.entries[name].lr / LR


def agreeing(plan: Plan, wanted: dict[str, tuple[float, float]]) -> int:
    return sum(scale(plan, n) == pytest.approx(s, rel=1e-9) for n, (s, _) in wanted.items())


# The last one is a ViT whose patch embedding is a ResNet, which has a matcher of its own.
@pytest.mark.parametrize("name", [*PLAIN, *STAGED, "resnet18", "vit_small_r26_s32_224"])
def test_every_scale_and_weight_decay_of_a_live_timm_model_is_timms_own(name: str) -> None:
    model = timm_model(name)
    plan, wanted = plan_model(model, timm_config(model)), groups_of_timm(model)
    assert plan.entries.keys() == wanted.keys() and not plan.warnings
    for key, (wanted_scale, decay) in wanted.items():
        assert scale(plan, key) == pytest.approx(wanted_scale, rel=1e-9), key
        assert plan.entries[key].weight_decay == decay, key


@pytest.mark.parametrize("name", [*PLAIN, *STAGED])
def test_names_alone_are_right_for_plain_vits_and_warn_of_stages(name: str) -> None:
    model = timm_model(name)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    plan = build_plan(shapes, timm_config(model))
    assert agreeing(plan, groups_of_timm(model)) == STAGED.get(name, len(shapes))
    said = [text for text in plan.warnings if "Plan the live model" in text]
    assert len(said) == (name in STAGED)


def test_frozen_layers_count_and_a_model_without_a_head_ends_at_factor_one() -> None:
    for more in ({}, {"num_classes": 0}):
        model = timm_model("swin_tiny_patch4_window7_224", **more)
        for key, param in model.named_parameters():
            param.requires_grad = not key.startswith("layers.0.")
        plan, wanted = plan_model(model, timm_config(model)), groups_of_timm(model)
        assert plan.entries.keys() == wanted.keys()
        assert agreeing(plan, wanted) == len(wanted)
        assert max(scale(plan, key) for key in wanted) == 1.0


def test_adapters_and_a_head_of_ones_own_keep_the_layers_of_the_timm_model() -> None:
    plain = timm_model("swin_tiny_patch4_window7_224")
    wanted = groups_of_timm(plain)
    lora = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"])
    for wrap in (get_peft_model, lambda model, how: inject_adapter_in_model(how, model)):
        model = timm_model("swin_tiny_patch4_window7_224")
        config = timm_config(model, no_decay=["ndim<=1"])
        plan = plan_model(wrap(model, lora), config)
        adapted = {key for key in plan.entries if ".lora_" in key}
        assert len(adapted) == 24
        for key in adapted:
            base = f"{key.partition('.lora_')[0]}.weight"
            assert scale(plan, key) == pytest.approx(wanted[base][0], rel=1e-9), key
    outer: Any = nn.Module()
    body = timm_model("swin_tiny_patch4_window7_224", num_classes=0)
    outer.body, outer.head = body, nn.Linear(768, 3)
    plan = plan_model(outer, timm_config(outer.body, no_decay=["ndim<=1"]))
    assert scale(plan, "head.weight") == 1.0
    last = max(scale(plan, key) for key in plan.entries if not key.startswith("head."))
    assert last == RATE, "the head is a layer of its own, after the body's last"
    inside = {key: scale(plan, f"body.{key}") for key, _ in body.named_parameters()}
    assert inside == pytest.approx({key: wanted[key][0] for key in inside}, rel=1e-9)


def test_num_layers_asks_the_names_and_other_conventions_do_not_ask_the_model() -> None:
    model = timm_model("vit_base_patch16_224")
    deeper = plan_model(model, timm_config(model, num_layers=20))
    assert scale(deeper, "blocks.0.attn.qkv.weight") == pytest.approx(RATE**20, rel=1e-9)
    beit = plan_model(model, timm_config(model, convention="beit"))
    assert scale(beit, "norm.weight") == 1.0
    assert scale(beit, "blocks.11.attn.qkv.weight") == RATE


PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize("family", ["ViT", "Dinov2"])
def test_the_final_norm_of_transformers_vits_joins_the_last_block(family: str) -> None:
    import transformers as hf

    config = getattr(hf, f"{family}Config")(**PICTURE)
    model = getattr(hf, f"{family}ForImageClassification")(config)
    settings = {
        "enabled": True,
        "component_lr": {},
        "depth_strategy": "layer_decay",
        "layer_decay": RATE,
        "convention": "timm",
        "unmatched": "default",
    }
    plan = plan_model(model, {"learning_rate": LR, "per_layer_lr": settings})
    body = {"ViT": "vit", "Dinov2": "dinov2"}[family]
    for key in plan.entries:
        layer = re.search(r"layers?\.(\d+)\.", key)
        power = 3 - int(layer[1]) if layer else 0
        if key.startswith(f"{body}.embeddings."):
            power = 4
        elif key.startswith(f"{body}.layernorm."):
            power = 1
        assert scale(plan, key) == pytest.approx(RATE**power, rel=1e-9), key


# RF-DETR

MODELS = ("Nano", "Small", "Medium", "Large", "Base", "SegNano", "KeypointPreview")
ENCODER, LAYER, BASE, COMPONENT = 1.5e-4, 0.8, 1e-4, 0.7


def rfdetr_model(name: str, **more: Any) -> tuple[Any, Any, Any]:
    """(model, its config, its train config); nothing is downloaded."""
    reason = "the extra `families` is not installed"
    rf: Any = pytest.importorskip("rfdetr.config", reason=reason)
    from rfdetr.models.lwdetr import build_model_from_config

    train = rf.TrainConfig(dataset_dir=".", output_dir=".")
    # With any name but None nothing of DINOv2 is fetched; the file itself is never opened.
    config = getattr(rf, f"RFDETR{name}Config")(device="cpu", pretrain_weights="no.pth", **more)
    with torch.device("meta"):
        return build_model_from_config(config, train), config, train


def groups_of_rfdetr(model: Any, config: Any, train: Any) -> dict[str, tuple[float, float]]:
    """{name: (lr, weight decay)} of an AdamW on the groups that RF-DETR's training builds."""
    from rfdetr._namespace import _namespace_from_configs
    from rfdetr.training.param_groups import get_param_dict

    groups = get_param_dict(_namespace_from_configs(config, train), model)
    optimizer = torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay)
    found: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            found[id(param)] = (group["lr"], group["weight_decay"])
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def rfdetr_config(**more: Any) -> dict[str, Any]:
    block = {"enabled": True, "preset": "rfdetr", "weight_decay": 1e-4, **more}
    return {"learning_rate": 1e-4, "per_layer_lr": block}


CASES = [
    *((name, {}) for name in MODELS),
    ("Nano", {"freeze_encoder": True}),
    ("Nano", {"backbone_lora": True}),
]


@pytest.mark.parametrize(("name", "more"), CASES, ids=str)
def test_every_rate_and_weight_decay_of_a_live_rfdetr_is_the_librarys(
    name: str, more: dict[str, Any]
) -> None:
    model, config, train = rfdetr_model(name, **more)
    plan = plan_model(model, rfdetr_config(convention="rfdetr"))
    wanted = groups_of_rfdetr(model, config, train)
    assert plan.entries.keys() == wanted.keys()
    for key, (lr, decay) in wanted.items():
        assert plan.entries[key].lr == pytest.approx(lr, rel=1e-9), key
        assert plan.entries[key].weight_decay == decay, key
    given = rfdetr_config(convention="rfdetr", out_feature_indexes=list(config.out_feature_indexes))
    if not more:
        shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
        named = build_plan(shapes, given).entries
        assert {k: e.lr for k, e in named.items()} == {k: e.lr for k, e in plan.entries.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_seed_convention_is_the_published_heuristic_on_every_rfdetr(name: str) -> None:
    """12 layers and no lr_component_decay squared: not what the installed library does."""
    model, config, train = rfdetr_model(name)
    plan = plan_model(model, rfdetr_config())
    for key, entry in plan.entries.items():
        expected = BASE
        if key.startswith("backbone.0.encoder."):
            layer = re.search(r"\.layer\.(\d+)\.", key)
            number = int(layer[1]) + 1 if layer else 0 if ".embeddings." in key else 13
            expected = ENCODER * LAYER ** (13 - number)
        elif key.startswith("transformer.decoder."):
            expected = BASE * COMPONENT
        assert entry.lr == pytest.approx(expected, rel=1e-9), key
    theirs = groups_of_rfdetr(model, config, train)
    differ = [k for k, (lr, _) in theirs.items() if plan.entries[k].lr != pytest.approx(lr)]
    assert all(key.startswith("backbone.0.encoder.") for key in differ) and len(differ) == 223


def test_what_is_given_wins_over_the_model_and_names_alone_say_what_they_count() -> None:
    model, _, _ = rfdetr_model("Nano")
    first = "backbone.0.encoder.encoder.encoder.layer.0.norm1.weight"
    given = plan_model(model, rfdetr_config(convention="rfdetr", out_feature_indexes=[2, 5, 8, 11]))
    assert given.entries[first].lr == pytest.approx(ENCODER * 0.49 * LAYER**12, rel=1e-9)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    named = build_plan(shapes, rfdetr_config(convention="rfdetr"))
    assert named.entries[first].lr == pytest.approx(ENCODER * 0.49 * LAYER**12, rel=1e-9)
    assert sum("out_feature_indexes" in text for text in named.warnings) == 1
    live = plan_model(model, rfdetr_config(convention="rfdetr"))
    assert live.entries[first].lr == pytest.approx(ENCODER * 0.49 * LAYER**13, rel=1e-9)
    assert not any("out_feature_indexes" in text for text in live.warnings)


def test_rf_detr_of_transformers_has_the_librarys_rates_on_its_own_names() -> None:
    import transformers as hf

    if not hasattr(hf, "RfDetrConfig"):
        pytest.skip("this transformers has no RF-DETR")
    backbone = {
        **PICTURE,
        "model_type": "rf_detr_dinov2",
        "num_windows": 2,
        "image_size": 32,
        "out_features": ["stage1", "stage3"],
    }
    config = hf.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_layers=2, num_queries=10, group_detr=2
    )
    plan = plan_model(
        hf.RfDetrForObjectDetection(config), rfdetr_config(convention="rfdetr")
    ).entries
    assert [key for key in plan if "backbone.projector." in key]
    for key, entry in plan.items():
        expected = BASE
        if key.startswith("model.backbone.backbone."):
            layer = re.search(r"\.layer\.(\d+)\.", key)
            number = int(layer[1]) + 1 if layer else 0 if ".embeddings." in key else 5
            expected = ENCODER * 0.49 * LAYER ** (5 - number)
        elif key.startswith("model.decoder."):
            expected = BASE * COMPONENT
        assert entry.lr == pytest.approx(expected, rel=1e-9), key
