"""Adapters in every form that is offered for a class, loaded by the real pipelines of diffusers."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_layerlr import ConfigError, cli, export_weights
from dist_layerlr.export.export import FORMATS
from dist_layerlr.export.loaders import LOADERS, original_path
from launch.trainer.families import get_family
from launch.trainer.tiny import flux2, pixart, sd15, sdxl

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = 24
FLUX = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 16}
"""What Qwen and Chroma share."""
WAN_TARGETS = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2"]


def tiny(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**settings)


NETWORKS: dict[str, tuple[str, Callable[[], Any], Any]] = {
    "sd15": ("StableDiffusionPipeline", lambda: sd15.PARTS["sd15"]()["unet"], ATTENTION),
    "sdxl": ("StableDiffusionXLPipeline", lambda: sdxl.PARTS["sdxl"]()["unet"], ATTENTION),
    "flux_2": (
        "Flux2KleinPipeline",
        lambda: flux2.PARTS["flux_2_klein_4b"]()["transformer"],
        get_family("flux_2_klein_4b").lora_targets({}),
    ),
    "pixart": (
        "PixArtSigmaPipeline",
        lambda: pixart.PARTS["pixart"]()["transformer"],
        ATTENTION,
    ),
    "sd35": (
        "StableDiffusion3Pipeline",
        tiny(
            "SD3Transformer2DModel",
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            caption_projection_dim=16,
            qk_norm="rms_norm",
            pooled_projection_dim=10,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
        ),
        [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    ),
    "qwen": (
        "QwenImagePipeline",
        tiny(
            "QwenImageTransformer2DModel",
            **FLUX,
            out_channels=4,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 6, 6),
        ),
        ATTENTION,
    ),
    "zimage": (
        "ZImagePipeline",
        tiny(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        ),
        ATTENTION,
    ),
    "chroma": (
        "ChromaPipeline",
        tiny(
            "ChromaTransformer2DModel",
            **FLUX,
            num_single_layers=2,
            joint_attention_dim=TEXT,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
        ATTENTION,
    ),
    "sana": (
        "SanaPipeline",
        tiny(
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            sample_size=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT,
        ),
        ATTENTION,
    ),
    "wan": (
        "WanPipeline",
        tiny(
            "WanTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
        ),
        WAN_TARGETS,
    ),
    "ltx2": (
        "LTX2Pipeline",
        tiny(
            "LTX2VideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            caption_channels=16,
            rope_type="split",
        ),
        # Some outside the blocks, whose names the original model spells in another way.
        [*ATTENTION, "proj_in", "audio_proj_in", "time_embed.linear"],
    ),
    "hunyuan_video": (
        "HunyuanVideoPipeline",
        tiny(
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=2,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 4, 4),
        ),
        ATTENTION,
    ),
}
"""Name -> pipeline, tiny network, LoRA's targets."""
STEMS = {"pipeline": "pytorch_lora_weights", "comfyui": "comfyui_lora", "kohya": "lora"}
READ_BY_PIPELINES = {
    "comfyui": (
        "sd15",
        "sdxl",
        "sd35",
        "flux_2",
        "qwen",
        "zimage",
        "chroma",
        "wan",
        "ltx2",
    ),
    "kohya": ("sd15", "sdxl", "qwen", "zimage", "wan"),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return NETWORKS[name][1]().eval()


def adapted(name: str, **settings: Any) -> Any:
    """A network with an adapter that does something; alpha is not the rank."""
    model, targets = built(name), NETWORKS[name][2]
    given: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": targets, **settings}
    torch.manual_seed(1)
    model.requires_grad_(False)
    peft.inject_adapter_in_model(
        peft.LoraConfig(init_lora_weights=False, **given), model, "default"
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in parameter_name.split("."):
            parameter.data.mul_(1.5)  # as training would: the start is the norm of the weight
    return model


def pipeline_of(name: str, network: Any) -> Any:
    cls = getattr(diffusers, NETWORKS[name][0])
    asked = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {
        key: None for key, p in asked.items() if p.default is p.empty and key != "self"
    }
    parts |= {n: False for n in ("requires_safety_checker", "add_watermarker") if n in asked}
    component = "unet" if "unet" in parts else "transformer"
    return cls(**{**parts, component: network})


def merged(model: Any) -> dict[str, Tensor]:
    """Weights with every adapter merged into them: they are all that an output depends on."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = model.state_dict()
    return {key.replace(".base_layer.", "."): v for key, v in state.items() if "lora_" not in key}


def loaded(name: str, file: Path) -> dict[str, Tensor]:
    network = built(name)
    pipeline_of(name, network).load_lora_weights(file.parent, weight_name=file.name)
    return merged(network)


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)


def export(model: Any, folder: Path, form: str, **more: Any) -> Path:
    (file,) = export_weights(model, folder, format=form, **more)
    assert file.name == f"{STEMS[form]}.safetensors"
    return file


WITH_LOADER = [
    name for name in NETWORKS if LOADERS[type(built(name)).__name__].component is not None
]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "use_rslora": True, "alpha_pattern": {"to_q": 9}}],
    ids=str,
)
@pytest.mark.parametrize("name", WITH_LOADER)
def test_a_pipeline_loads_exactly_what_was_trained(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(name, **settings)
    file = export(model, tmp_path, "pipeline")
    plain, wanted = merged(built(name)), merged(model)
    assert farthest(plain, wanted) > 1e-2
    assert farthest(loaded(name, file), wanted) < 1e-5


@pytest.mark.parametrize(
    ("form", "name"), [(f, name) for f, names in READ_BY_PIPELINES.items() for name in names]
)
def test_other_forms_are_read_exactly_where_a_pipeline_knows_them(
    form: str, name: str, tmp_path: Path
) -> None:
    model = adapted(name, use_rslora=True)
    file = export(model, tmp_path, form)
    assert farthest(loaded(name, file), merged(model)) < 1e-5


def test_every_form_that_is_offered_was_tried_and_every_other_is_refused(tmp_path: Path) -> None:
    tried: dict[str, list[str]] = {form: [] for form in STEMS}
    for name in NETWORKS:
        model = adapted(name)
        for form, names in tried.items():
            try:
                export(model, tmp_path / name, form)
            except ConfigError as error:
                assert "the file would load nothing, because" in str(error)
                assert type(model).__name__ in str(error) and "peft" in str(error)
            else:
                names.append(name)
    assert tried["pipeline"] == WITH_LOADER
    assert sorted(tried["kohya"]) == sorted(READ_BY_PIPELINES["kohya"])
    # ComfyUI alone reads PixArt's.
    assert sorted(tried["comfyui"]) == sorted([*READ_BY_PIPELINES["comfyui"], "pixart"])


def test_pixarts_comfyui_names_are_diffusers_own_and_the_scale_is_in_lora_b(
    tmp_path: Path,
) -> None:
    model = adapted("pixart")
    found = load_file(export(model, tmp_path, "comfyui"))
    layer = model.get_submodule("transformer_blocks.0.attn1.to_q")
    key = "transformer.transformer_blocks.0.attn1.to_q"
    assert torch.equal(found[f"{key}.lora_A.weight"], layer.lora_A["default"].weight)
    assert torch.equal(found[f"{key}.lora_B.weight"], 3 * layer.lora_B["default"].weight)
    assert not [name for name in found if name.endswith("alpha")]


def test_pixarts_adapter_loads_by_peft_alone(tmp_path: Path) -> None:
    model = adapted("pixart", use_dora=True)
    with pytest.raises(ConfigError, match="PixArt's pipelines have no load_lora_weights"):
        export(model, tmp_path, "pipeline")
    assert not hasattr(diffusers.PixArtSigmaPipeline, "load_lora_weights")
    export_weights(model, tmp_path, format="peft")
    found = peft.PeftModel.from_pretrained(built("pixart"), str(tmp_path)).base_model.model
    assert farthest(merged(found), merged(model)) == 0


@pytest.mark.parametrize("name", ["sd15", "sd35", "wan"])
def test_without_its_header_a_pipeline_takes_the_rank_for_alpha(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    file = export(model, tmp_path, "pipeline")
    save_file(load_file(file), file, metadata={"format": "pt"})
    assert farthest(loaded(name, file), merged(model)) > 1e-2


@pytest.mark.parametrize("name", ["sd15", "sana", "hunyuan_video"])
def test_the_names_of_peft_load_nothing_in_a_pipeline(name: str, tmp_path: Path) -> None:
    (file,) = export_weights(adapted(name), tmp_path, format="peft")
    assert farthest(loaded(name, file), merged(built(name))) == 0


def test_the_header_says_alpha_and_run_under_the_pipelines_prefix(tmp_path: Path) -> None:
    for name, prefix in (("sd15", "unet"), ("wan", "transformer")):
        file = export(adapted(name), tmp_path / name, "pipeline", metadata={"run": "r1"})
        with safe_open(str(file), framework="pt") as opened:
            metadata, keys = opened.metadata(), list(opened.keys())
        packed = json.loads(metadata["lora_adapter_metadata"])
        assert metadata["run"] == "r1" and metadata["format"] == "pt"
        assert packed[f"{prefix}.lora_alpha"] == 6 and packed[f"{prefix}.r"] == 2
        assert {key.split(".")[0] for key in keys} == {prefix}


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_a_dora_is_refused_where_its_magnitudes_have_no_name(form: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"magnitude.* under a {form} name: only plain LoRA"):
        export(adapted("wan", use_dora=True), tmp_path, form)


def test_parts_of_a_path_are_renamed_whole_and_the_longest_first() -> None:
    table = {"attn1": "self_attn", "to_out.0": "o", "to_out": "wrong", "a.b": "c"}
    for path, wanted in (
        ("blocks.0.attn1.to_out.0", "blocks.0.self_attn.o"),
        ("blocks.0.attn10.to_out", "blocks.0.attn10.wrong"),
        ("x.a.b.attn1", "x.c.self_attn"),
        ("x.a.bb", "x.a.bb"),
    ):
        assert original_path(tuple(path.split(".")), table) == tuple(wanted.split("."))


def test_a_class_that_nobody_knows_has_pefts_form_and_kohyas_names_of_its_own(
    tmp_path: Path,
) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), model, "default")
    model.peft_config = {"default": peft.LoraConfig(target_modules=["0"])}
    with pytest.raises(ConfigError, match="adapter of Sequential as pipeline: it is not known"):
        export(model, tmp_path, "pipeline")
    assert load_file(export(model, tmp_path, "kohya")).keys() == {
        "lora_unet_0.alpha",
        "lora_unet_0.lora_down.weight",
        "lora_unet_0.lora_up.weight",
    }


def test_the_command_line_offers_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["export", "--help"])
    assert "{" + ",".join(FORMATS) + "}" in re.sub(r"\s", "", capsys.readouterr().out)
