"""What is exported loads with diffusers, transformers and PEFT, and gives the trained model's
outputs."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel  # noqa: F401  before the fork: imports take longer than most cases
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from transformers import Qwen3Config, Qwen3ForCausalLM

from dist_layerlr import ConfigError, attach, bind, export_weights, plan_model, save_checkpoint
from dist_layerlr.cli import main
from dist_layerlr.export.export import choose
from dist_layerlr.plan.entries import Plan
from dist_layerlr.weights.gather import LiveWeights
from tests.support.drivers import ds_config, start_deepspeed
from tests.support.parity import Recipe
from tests.support.ranks import run_ranks

SHARDERS = ("none", "fsdp2", "fsdp1_flat", "zero1", "zero3")
BLOCK = {
    "enabled": True,
    "component_lr": {"self_attn": 1e-2, "ffn": 5e-3},
    "default_lr": 1e-3,
    "unmatched": "default",
}
CONFIG = {"per_layer_lr": BLOCK}
ALPHA, RANK = 6, 4


def wan() -> Any:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )


def wan_output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    clip, prompt = (
        torch.randn(1, 4, 1, 4, 4, generator=generator),
        torch.randn(1, 3, 16, generator=generator),
    )
    found: torch.Tensor = model(clip, torch.tensor([500.0]), prompt, return_dict=False)[0]
    return found


def unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def unet_output(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    picture, prompt = (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.randn(1, 3, 8, generator=generator),
    )
    found: torch.Tensor = model(picture, torch.tensor([500]), prompt, return_dict=False)[0]
    return found


def llm() -> Any:
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def llm_output(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(7)[None]).logits
    return found


@dataclass(frozen=True)
class Kind:
    build: Callable[[], Any]
    output: Callable[[Any], torch.Tensor]
    format: str
    load: Callable[..., Any]
    lora: tuple[str, ...]
    frozen: tuple[str, ...]
    """Beginnings of the names that a full finetune holds still."""


KINDS = {
    "wan": Kind(
        wan,
        wan_output,
        "diffusers",
        WanTransformer3DModel.from_pretrained,
        ("to_q", "ffn.net.2"),
        ("condition_embedder.",),
    ),
    "unet": Kind(
        unet,
        unet_output,
        "diffusers",
        UNet2DConditionModel.from_pretrained,
        ("to_q", "conv1"),
        ("time_embedding.", "conv_in."),
    ),
    "llm": Kind(
        llm,
        llm_output,
        "transformers",
        Qwen3ForCausalLM.from_pretrained,
        ("q_proj", "down_proj"),
        ("model.norm.",),
    ),
}


def built(kind: Kind, *, lora: bool) -> Any:
    torch.manual_seed(0)
    model = kind.build().eval()
    if lora:
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(kind.lora), init_lora_weights=False
        )
        model.requires_grad_(False)
        model.add_adapter(config, "default")
    else:
        for name, param in model.named_parameters():
            param.requires_grad_(not name.startswith(kind.frozen))
    return model


def sharded(sharder: str, model: Any, plan: Plan) -> tuple[Any, Any]:
    """(wrapped model, what steps it)."""
    make = functools.partial(torch.optim.AdamW, lr=0.0)
    if sharder.startswith("zero"):
        optimizer = attach(plan, model, make, emission="segmented")
        config = ds_config(int(sharder[-1]), Recipe())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        bind(plan, engine)
        return engine, engine
    if sharder == "fsdp2":
        for module in model.modules():
            if type(module).__name__ in (
                "WanTransformerBlock",
                "BasicTransformerBlock",
                "Qwen3DecoderLayer",
            ):
                fully_shard(module)
        fully_shard(model)
    if sharder == "fsdp1_flat":
        model = FSDP(
            model,
            use_orig_params=False,
            auto_wrap_policy=units(model),
            device_id=torch.device("cpu"),
        )
    return model, attach(plan, model, make)


def units(model: Any) -> CustomPolicy:
    """A flat unit cannot mix frozen and trained parameters, nor show its own while the forward asks
    for them."""
    kinds = {
        path: {p.requires_grad for p in module.parameters()}
        for path, module in model.named_modules()
    }
    if hasattr(model, "peft_config"):
        chosen = [
            m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
        ]
    else:
        chosen = [
            m
            for n, m in model.named_modules()
            if kinds[n] == {False} and len(kinds[n.rpartition(".")[0]]) == 2
        ]
    chosen += [module for path, module in model.named_modules() if path.endswith("time_embedder")]
    return CustomPolicy(lambda module: any(module is one for one in chosen))


def trained(sharder: str, kind: Kind, *, lora: bool) -> tuple[Any, Any, Plan]:
    model = built(kind, lora=lora)
    plan = plan_model(model, CONFIG)
    model, stepper = sharded(sharder, model, plan)
    loss = kind.output(model).square().mean()
    if sharder.startswith("zero"):
        stepper.backward(loss)
    else:
        loss.backward()
    stepper.step()
    return model, stepper, plan


def same(kind: Kind, model: Any, wanted: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.allclose(kind.output(model.eval()), wanted, atol=1e-5, rtol=1e-4)


def check_full(sharder: str, key: str, folder: Path) -> None:
    kind = KINDS[key]
    model, _, plan = trained(sharder, kind, lora=False)
    with torch.no_grad():
        wanted = kind.output(model)
    metadata = {"plan_digest": plan.digest, "step": "1"}
    start = folder / "start"
    if dist.get_rank() == 0:
        built(kind, lora=False).save_pretrained(start)
    dist.barrier()
    files = export_weights(model, folder / "out", format=kind.format, metadata=metadata, base=start)
    split = export_weights(
        model, folder / "split", format=kind.format, base=start, file_bytes=20_000
    )
    assert len(files) == 1 and len(split) > 2
    if dist.get_rank() == 0:
        with safe_open(str(files[0]), framework="pt") as file:
            assert file.metadata() == {"format": "pt", **metadata}
        state = load_file(files[0])
        assert state.keys() == load_file(next(start.glob("*.safetensors"))).keys()
        unmoved = load_file(next(start.glob("*.safetensors")))
        moved = {name for name in state if not torch.equal(state[name], unmoved[name])}
        assert moved == {name for name in state if not name.startswith(kind.frozen)}
        for loaded in (kind.load(folder / "out"), kind.load(folder / "split")):
            same(kind, loaded, wanted)
    dist.barrier()


def check_lora(sharder: str, key: str, folder: Path) -> None:
    kind = KINDS[key]
    model, stepper, plan = trained(sharder, kind, lora=True)
    with torch.no_grad():
        wanted = kind.output(model)
    export_weights(model, folder / "out", format="peft")
    export_weights(model, folder / "kohya", format="kohya", dtype=torch.float32)
    forms = {"peft": "out/adapter_model", "kohya": "kohya/lora"}
    if key != "llm":
        export_weights(model, folder / "pipeline", format="pipeline")
        forms["pipeline"] = "pipeline/pytorch_lora_weights"
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    saving = save_checkpoint(
        folder / "saved", plan, model, stepper, step=1, extra={"adapter_config": config}
    )
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        base = kind.build()
        same(kind, PeftModel.from_pretrained(base, str(folder / "out")), wanted)
        if key != "llm":
            check_with_diffusers(kind, folder, wanted)
        for format, file in forms.items():
            again = str(folder / f"from_disk_{format}")
            assert main(["export", str(saving.path), again, "--format", format]) == 0
            live, disk = (
                load_file(folder / f"{file}.safetensors"),
                load_file(next(Path(again).glob("*.safetensors"))),
            )
            assert live.keys() == disk.keys() and all(
                torch.equal(live[name], disk[name]) for name in live
            )
    dist.barrier()


def check_with_diffusers(kind: Kind, folder: Path, wanted: torch.Tensor) -> None:
    torch.manual_seed(0)
    model = kind.build()
    model.load_lora_adapter(
        folder / "out", weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    same(kind, model, wanted)
    if kind is KINDS["unet"]:
        state, alphas = _convert_non_diffusers_lora_to_diffusers(
            load_file(folder / "kohya" / "lora.safetensors")
        )
        assert set(alphas.values()) == {float(ALPHA)}
        torch.manual_seed(0)
        model = kind.build()
        model.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
        same(kind, model, wanted)


def on_rank(rank: int, world_size: int, sharder: str, folder: str) -> None:
    if sharder.startswith("zero"):
        start_deepspeed()
    for key in (
        KINDS if not sharder.startswith("zero") else ("wan", "llm")
    ):  # 200 parameters take ZeRO-3 15 s
        check_full(sharder, key, Path(folder) / key / "full")
        check_lora(sharder, key, Path(folder) / key / "lora")


@pytest.mark.parametrize("sharder", SHARDERS)
def test_exports_load_and_give_the_trained_models_outputs(sharder: str, tmp_path: Path) -> None:
    run_ranks(on_rank, 1 if sharder == "none" else 2, sharder, str(tmp_path))


def lose_and_keep(rank: int, world_size: int, folder: str) -> tuple[set[str], set[str]]:
    """(names that zero_to_fp32 leaves out, names that the export does)."""
    start_deepspeed()
    kind = KINDS["wan"]
    engine, _, _ = trained("zero1", kind, lora=False)
    engine.save_checkpoint(folder, tag="t")
    (file,) = export_weights(engine, Path(folder) / "out", format="diffusers")
    names = {name for name, _ in engine.module.named_parameters()}
    theirs = get_fp32_state_dict_from_zero_checkpoint(folder, tag="t")
    return names - theirs.keys(), names - load_file(file).keys()


def test_15_naive_zero_to_fp32_loses_frozen_parameters_at_stage_1_and_the_export_keeps_them(
    tmp_path: Path,
) -> None:
    lost, left_out = run_ranks(lose_and_keep, 2, str(tmp_path))[0]
    assert lost == {n for n, _ in wan().named_parameters() if n.startswith(KINDS["wan"].frozen)}
    assert left_out == set()


def refused(rank: int, world_size: int, folder: str) -> None:
    lora, full = built(KINDS["wan"], lora=True), built(KINDS["wan"], lora=False)
    for model, format, words in (
        (lora, "diffusers", "adapter 'default' as diffusers weights"),
        (full, "peft", "No adapter 'default' to export as peft"),
        (full, "gguf", "format='gguf': must be one of diffusers, transformers, peft, pipeline"),
    ):
        with pytest.raises(ConfigError, match=words):
            export_weights(model, folder, format=format)
    with pytest.raises(
        ConfigError, match=r"Invalid adapter config with keys \['lr'\]: no peft_type"
    ):
        choose(LiveWeights(lora).table, "kohya", None, "default", {"lr": 1.0}, {}, None)
    lora.proj_out.weight.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"Cannot export proj_out\.weight with adapter 'default': it is trained"
    ):
        export_weights(lora, folder, format="peft")
    blocked = Path(folder) / "blocked"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="Cannot write .*blocked"):
        export_weights(full, blocked, format="diffusers")


def test_what_cannot_be_exported_is_refused_alike_and_leaves_no_rank_waiting(
    tmp_path: Path,
) -> None:
    run_ranks(refused, 2, str(tmp_path))
