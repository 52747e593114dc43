"""Folders of transformers whose tensors have other names or shapes than the live model's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import transformers as hf
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_layerlr import attach, bind, export_weights, plan_model
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.sharders import materialize, partition_empty, sharder_of
from dist_layerlr.weights import check_pretrained, disk_names, load_pretrained
from dist_layerlr.weights.tensorfile import FileTensor
from tests.support.drivers import ds_config, start_deepspeed
from tests.support.parity import Recipe
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    int(hf.__version__.split(".")[0]) < 5, reason="transformers 4 stores the live names"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "head_dim": 8,
}
EXPERTS = 12
"""More than ten, so that the order of their numbers is not that of the text."""
PICTURE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}


def qwen3_moe() -> Any:
    more = {"moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **more))


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=EXPERTS))


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(**PICTURE))


def dinov2() -> Any:
    # The class that has the rules is the root itself; its feed-forward is two matrices in one.
    return hf.Dinov2Model(hf.Dinov2Config(**PICTURE, use_swiglu_ffn=True))


def rf_detr() -> Any:
    backbone = {
        **PICTURE,
        "model_type": "rf_detr_dinov2",
        "num_windows": 2,
        "image_size": 32,
        "out_features": ["stage1", "stage2"],
    }
    more = {"decoder_layers": 2, "num_queries": 10, "group_detr": 2}
    return hf.RfDetrForObjectDetection(
        hf.RfDetrConfig(backbone_config=backbone, d_model=32, **more)
    )


MODELS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "vit": vit,
    "dinov2": dinov2,
    "rf_detr": rf_detr,
}


def built(name: str, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()


def saved(name: str, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """Write a folder as transformers does it, and return the live tensors."""
    model = built(name)
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            # No two tensors alike, and no norm or bias that is all ones or zeros.
            param.add_(torch.arange(param.numel()).view(param.shape) / 1e4 + number)
    model.save_pretrained(folder, **more)
    return {key: value.clone() for key, value in model.state_dict().items()}


def names_on_disk(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            found.update(opened.keys())
    return found


def empty(name: str) -> Any:
    with init_empty_weights(include_buffers=False):
        model = built(name, seed=1)
    model.tie_weights()
    return model


def differing(model: nn.Module, wanted: dict[str, torch.Tensor]) -> list[str]:
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    return [key for key, value in wanted.items() if not torch.equal(state[key], value)]


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_save_pretrained_loads_and_its_export_reloads_by_from_pretrained(
    name: str, tmp_path: Path
) -> None:
    wanted = saved(name, tmp_path / "saved")
    assert not names_on_disk(tmp_path / "saved") <= wanted.keys(), "the case would test nothing"
    check_pretrained(empty(name), tmp_path / "saved")
    model = built(name, seed=1)
    load_pretrained(model, tmp_path / "saved")
    assert differing(model, wanted) == []
    export_weights(model, tmp_path / "out", format="transformers", base=tmp_path / "saved")
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert differing(again, wanted) == []


@pytest.mark.parametrize("name", ["qwen3_moe", "vit"])
def test_live_names_and_split_files_load_too(name: str, tmp_path: Path) -> None:
    wanted = saved(name, tmp_path / "live", save_original_format=False)
    assert names_on_disk(tmp_path / "live") == wanted.keys()
    saved(name, tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 3
    for folder in ("live", "split"):
        model = built(name, seed=1)
        load_pretrained(model, tmp_path / folder)
        assert differing(model, wanted) == [], folder


def test_a_model_below_another_and_one_with_adapters_are_filled(tmp_path: Path) -> None:
    wanted = saved("qwen3_moe", tmp_path)
    target = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapted = get_peft_model(built("qwen3_moe", seed=1), target)
    load_pretrained(adapted, tmp_path, fresh=lambda name, shape: torch.zeros(shape))
    assert differing(adapted.unload(), wanted) == []
    stored = load_file(tmp_path / "model.safetensors")
    save_file({f"body.{key}": value for key, value in stored.items()}, tmp_path / "outer.st")
    outer: Any = nn.Module()
    outer.body = built("qwen3_moe", seed=1)
    load_pretrained(outer, tmp_path / "outer.st")
    assert differing(outer.body, wanted) == []


def test_a_missing_expert_and_a_tensor_too_many_are_refused_by_name(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    lost = "model.layers.1.mlp.experts.11.down_proj.weight"
    save_file({key: value for key, value in stored.items() if key != lost}, file)
    with pytest.raises(ModelSourceError, match=r"experts\.0\.down_proj.*\(11, 32, 16\).*\(12, 32"):
        check_pretrained(empty("qwen3_moe"), tmp_path)
    save_file({**stored, "model.layers.2.mlp.gate.weight": torch.zeros(EXPERTS, 32)}, file)
    with pytest.raises(ModelSourceError, match=r"'model.layers.2.mlp.gate.weight'.*does not have"):
        check_pretrained(empty("qwen3_moe"), tmp_path)


def sharded(kind: str, name: str) -> Any:
    model = empty(name)
    if kind == "fsdp2":
        # The submodel that owns the rules is wrapped by itself, which changes its class.
        for child in model.children():
            fully_shard(child)
        fully_shard(model)
        materialize(model, "cpu")
        return model
    recipe = Recipe()
    config = ds_config(3, recipe)
    plan = plan_model(model, {"learning_rate": 1e-3})
    partition_empty(model, config)
    optimizer = attach(plan, model, recipe.make, emission="segmented")
    started, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    bind(plan, started)
    return started


def load_sharded(rank: int, world_size: int, folders: dict[str, str]) -> dict[str, int]:
    """{case: bytes that this rank read}, after comparing every element that it holds."""
    start_deepspeed()
    bytes_read: dict[str, int] = {}
    original = FileTensor.read_from
    for name, folder in folders.items():
        wanted = torch.load(Path(folder) / "live.pt")
        for kind in ("fsdp2", "zero 3"):
            model = sharded(kind, name)
            case = f"{name} {kind}"
            bytes_read[case] = 0

            def read(*args: Any, case: str = case) -> Any:
                bytes_read[case] += args[3] * args[0].dtype.itemsize
                return original(*args)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FileTensor, "read_from", read)
                load_pretrained(model, folder)
            held = sharder_of(model).true_weights()
            assert {span.name for span in held} == wanted.keys()
            for span in held:
                part = wanted[span.name].reshape(-1)[span.start : span.start + span.numel]
                assert torch.equal(span.tensor, part), f"{case}: {span.name}"
    return bytes_read


def test_each_rank_reads_the_bytes_of_its_own_elements_under_fsdp2_and_zero_3(
    tmp_path: Path,
) -> None:
    total: dict[str, int] = {}
    for name in ("qwen3_moe", "vit", "dinov2"):
        wanted = saved(name, tmp_path / name)
        torch.save(wanted, tmp_path / name / "live.pt")
        total[name] = sum(4 * value.numel() for value in wanted.values())
    by_rank = run_ranks(load_sharded, 2, {name: str(tmp_path / name) for name in total})
    for case in by_rank[0]:
        read = [counts[case] for counts in by_rank]
        assert sum(read) == total[case.partition(" ")[0]], case
        assert max(read) < 0.55 * sum(read), case


def test_a_rule_that_moves_single_columns_or_changes_values_is_refused() -> None:
    from transformers.core_model_loading import Chunk, Transpose, WeightConverter

    class Double(Chunk):
        def convert(self, input_dict: Any, **more: Any) -> Any:
            found = super().convert(input_dict, **more)
            return {key: 2 * value for key, value in found.items()}

    place = {"name": "old.weight", "file": Path("m.safetensors"), "offset": 0}
    source = FileTensor(**place, shape=(4, 6), dtype=torch.float32)
    for operation in (Transpose(0, 1), Double(0)):
        rule = WeightConverter("old.weight", ["new.weight"], [operation])
        target = disk_names._Target(rule, [source], ["old.weight"])
        with pytest.raises(ModelSourceError, match=r"'old.weight'.*save_original_format=False"):
            disk_names._joined("new.weight", target, disk_names._Skeleton(built("vit")))


def test_the_functions_of_transformers_are_those_that_were_read() -> None:
    """Fails when a release changes what ``disk_names`` calls: read it again, and renew READ_IN."""
    from transformers import conversion_mapping, core_model_loading

    known = {
        conversion_mapping.get_model_conversion_mapping: ["model", "key_mapping", "hf_quantizer"],
        core_model_loading.rename_source_key: [
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
        ],
        core_model_loading.dot_natural_key: ["s"],
        core_model_loading.WeightConverter.add_tensor: [
            "self",
            "target_key",
            "source_key",
            "source_pattern",
        ],
        core_model_loading.WeightConverter.convert: ["self", "layer_name", "model", "config"],
    }
    for function, names in known.items():
        text = f"{function.__qualname__} of transformers {hf.__version__}, read in"
        found = list(inspect.signature(function).parameters)[: len(names)]
        assert found == names, f"{text} {disk_names.READ_IN}"
    assert "source_patterns" in core_model_loading.WeightTransform.__slots__
