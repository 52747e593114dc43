"""Adapters that the trainer makes: DoRA under every sharder, chosen blocks, dropout, and files that
load where they are said to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_layerlr import ConfigError, cli, plan_model
from dist_layerlr.weights.tensorfile import stored_tensors
from launch.trainer.adapter_options import AdapterOptions
from launch.trainer.adapters import fresh_adapter, inject
from launch.trainer.families import get_family
from launch.trainer.options import load_options
from launch.trainer.tiny import flux2, sd15
from tests.support.extras import needs_families
from tests.support.jobs import ROOT, as_lora, call_of, largest_difference, run_in_ranks, weights

SHARDERS = {
    **{name: ["--sharding", name] for name in ("ddp", "fsdp1", "fsdp1_flat", "fsdp2")},
    **{
        f"zero{stage}": ["--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json")]
        for stage in (1, 2, 3)
    },
}


BY_DEFAULT = ["fsdp1_flat", "fsdp2", "zero3"]
"""Those that hold parts of a magnitude, or of the weight under it; the rest by `-m full`."""


def with_adapter(run_config: dict[str, Any], **adapter: Any) -> dict[str, Any]:
    config = as_lora(run_config)
    train = {**config["train"], "steps": 2, "micro_batch": 2}
    return {**config, "adapter": {"rank": 4, "alpha": 8, **adapter}, "train": train}


def losses(folder: Path) -> list[float]:
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def succeeded(ranks: int, calls: list[list[str]]) -> Iterator[Any]:
    for call, ended in zip(calls, run_in_ranks(ranks, calls), strict=True):
        assert ended.status == 0, f"{call}\n{ended.said}\n{ended.complaint}"
        yield ended


@pytest.mark.parametrize(
    "sharders",
    [BY_DEFAULT, pytest.param(list(SHARDERS), marks=pytest.mark.full, id="all")],
    ids=str,
)
def test_a_dora_starts_as_the_base_model_and_trains_alike_under_every_sharder(
    sharders: list[str], run_config: dict[str, Any], tmp_path: Path
) -> None:
    dora = with_adapter(run_config, type="dora", rslora=True)
    alone = ["--sharding", "none"]
    stream = {"enabled": True, "pinned_pool_mb": 64, "prefetch_window": 1, "min_numel": 1000}
    calls = [
        call_of(dora, tmp_path / "none", *alone),
        call_of(with_adapter(run_config), tmp_path / "lora", *alone),
        call_of({**dora, "memory": {"stagehand": stream}}, tmp_path / "streamed", *alone),
    ]
    list(succeeded(1, calls))
    assert largest_difference(weights(tmp_path / "none"), weights(tmp_path / "streamed")) == 0
    # Both adapters do nothing at first. Magnitudes that are not the norms would change everything.
    assert losses(tmp_path / "none")[0] == pytest.approx(losses(tmp_path / "lora")[0], rel=1e-6)
    reference = weights(tmp_path / "none")
    base = load_file(next(Path(run_config["model_path"]).glob("*.safetensors")))
    magnitudes = [name for name in reference if "lora_magnitude_vector" in name.split(".")]
    assert len(magnitudes) == len(reference) / 3 > 10
    for name in magnitudes:
        module = name.removeprefix("base_model.model.").rpartition(".")[0]
        moved = (reference[name] - base[f"{module}.weight"].norm(dim=1)).abs().max()
        assert 0 < moved < 0.01, module
    calls = [call_of(dora, tmp_path / label, *SHARDERS[label]) for label in sharders]
    list(succeeded(2, calls))
    for label in sharders:
        assert largest_difference(reference, weights(tmp_path / label)) <= 1e-5, label
        assert losses(tmp_path / label) == pytest.approx(losses(tmp_path / "none"), rel=1e-5)


def test_dropout_depends_on_the_samples_and_not_on_the_ranks_or_a_resume(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    config = with_adapter(run_config, dropout=0.5)
    one = [
        call_of(config, tmp_path / "one"),
        call_of(with_adapter(run_config), tmp_path / "without"),
        [*call_of(config, tmp_path / "resumed"), "--max-steps", "1", "--set", "train.save_every=1"],
        [*call_of(config, tmp_path / "resumed"), "--resume", "latest"],
    ]
    list(succeeded(1, one))
    list(succeeded(2, [call_of(config, tmp_path / "two", "--sharding", "ddp")]))
    reference = weights(tmp_path / "one")
    assert largest_difference(reference, weights(tmp_path / "two")) <= 1e-6
    assert largest_difference(reference, weights(tmp_path / "resumed")) <= 1e-6
    assert largest_difference(reference, weights(tmp_path / "without")) > 1e-5


def merged(model: Any) -> dict[str, Tensor]:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state = model.state_dict()
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if "lora_" not in k}


def test_a_runs_final_folder_loads_in_the_pipeline_as_in_peft(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_adapter(run_config, type="dora", rslora=True)
    config["train"]["save_every"] = 2
    plain = with_adapter(run_config)
    plain["train"]["save_every"] = 2
    calls = [call_of(config, tmp_path / "dora"), call_of(plain, tmp_path / "lora")]
    list(succeeded(1, calls))
    source = run_config["model_path"]
    base = dict(WanTransformer3DModel.from_pretrained(source).state_dict())
    for name in ("dora", "lora"):
        final = tmp_path / name / "out" / "final"
        network = WanTransformer3DModel.from_pretrained(source)
        by_peft = merged(PeftModel.from_pretrained(network, str(final)).base_model.model)
        network = WanTransformer3DModel.from_pretrained(source)
        none = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
        # The folder alone: of its two files diffusers takes its own.
        WanPipeline(transformer=network, **none).load_lora_weights(str(final))
        by_pipeline = merged(network)
        assert largest_difference(by_peft, by_pipeline) == 0
        assert largest_difference(by_peft, base) > 1e-4
        saved, out = tmp_path / name / "out" / "checkpoints", tmp_path / name / "again"
        assert cli.main(["export", str(saved), str(out), "--format", "pipeline"]) == 0
        file = "pytorch_lora_weights.safetensors"
        assert largest_difference(load_file(out / file), load_file(final / file)) == 0
    # The class is in the checkpoint: no --base is needed to know that this loads nowhere.
    saved = tmp_path / "dora" / "out" / "checkpoints"
    assert cli.main(["export", str(saved), str(tmp_path / "no"), "--format", "kohya"]) == 2
    assert "only plain LoRA has them" in capsys.readouterr().err


def test_a_final_folder_with_two_forms_is_planned_as_one_adapter(
    run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = call_of(with_adapter(run_config), tmp_path)
    list(succeeded(1, [call]))
    final, file = tmp_path / "out" / "final", str(tmp_path / "config.json")
    arguments = ["plan", str(final), "--config", file, "--base", run_config["model_path"]]
    assert cli.main([*arguments, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["parameters"]
    assert len(planned) == len(load_file(final / "adapter_model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fresh_dora_is_that_of_peft_on_linear_and_convolution_layers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    network = sd15.PARTS["sd15"]()["unet"].to(dtype)
    network.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    # What the model computes with: 16 bits are held in bf16.
    half = None if dtype == torch.float32 else torch.bfloat16
    start = fresh_adapter(stored_tensors(file).get, 0, half)
    targets = ["to_q", "proj_in", "conv1"]
    config = LoraConfig(target_modules=targets, use_dora=True, r=2)
    live = network if half is None else network.to(half).float()
    inject_adapter_in_model(config, live, "default")
    found = {name: p for name, p in live.named_parameters() if "lora_" in name}
    magnitudes = {name for name in found if "lora_magnitude_vector" in name.split(".")}
    assert {found[name].dim() for name in magnitudes} == {1, 4}
    for name, own in found.items():
        ours = start(name, tuple(own.shape))
        if name in magnitudes:
            torch.testing.assert_close(ours, own.data, rtol=1e-5, atol=0)
        else:
            assert bool(ours.any()) == bool(own.any()), name
    assert torch.equal(start(name, tuple(own.shape)), ours)


# Blocks


def on_meta(model_type: str, network: nn.Module) -> Any:
    with init_empty_weights(include_buffers=False):
        return get_family(model_type).build(dict(network.config))  # type: ignore[arg-type]


def injected(model_type: str, network: nn.Module, **adapter: Any) -> Any:
    model = on_meta(model_type, network)
    targets = get_family(model_type).lora_targets(dict(network.config))  # type: ignore[arg-type]
    inject(model, AdapterOptions(**adapter), targets)
    return model


def blocks_of(model: nn.Module) -> dict[str, set[int | None]]:
    """{stack: blocks in which something trains}, by the plan of what trains."""
    rates = {"per_layer_lr": {"enabled": True, "default_lr": 1e-3, "unmatched": "default"}}
    found: dict[str, set[int | None]] = {}
    for entry in plan_model(model, rates).entries.values():
        found.setdefault(entry.stack or "", set()).add(entry.block)
    return found


def test_blocks_are_those_of_the_plan_over_all_stages_of_a_unet() -> None:
    unet = sd15.PARTS["sd15"]()["unet"]
    # Three down blocks have attention, the fourth has none; the middle is 4, and up begins at 5.
    model = injected("sd15", unet, blocks=[1, 4, 8])
    assert blocks_of(model) == {"down_blocks": {1}, "mid_block": {4}, "up_blocks": {8}}
    assert isinstance(model, UNet2DConditionModel)


@needs_families
def test_blocks_are_counted_in_each_stack() -> None:
    network = flux2.PARTS["flux_2_klein_4b"]()["transformer"]
    assert blocks_of(injected("flux_2_klein_4b", network, blocks=[1])) == {
        "transformer_blocks": {1},
        "single_transformer_blocks": {1},
    }
    assert blocks_of(injected("flux_2_klein_4b", network, blocks=[2])) == {
        "single_transformer_blocks": {2}
    }


@needs_families
@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([7, 1], r"\[7\] hold none\. .*transformer_blocks: 0 to 1; single_transformer_blocks: 0"),
        ([3, 4], r"\[3, 4\] hold none\."),
    ],
)
def test_a_block_without_target_modules_is_refused_with_the_stacks_that_there_are(
    blocks: list[int], words: str
) -> None:
    network = flux2.PARTS["flux_2_klein_4b"]()["transformer"]
    with pytest.raises(ConfigError, match=rf"adapter\.blocks=\[{blocks[0]}.*{words}"):
        injected("flux_2_klein_4b", network, blocks=blocks)


def test_a_block_of_a_unet_without_attention_is_refused() -> None:
    unet = sd15.PARTS["sd15"]()["unet"]
    with pytest.raises(ConfigError, match=r"\[3\] hold none\. .*mid_block, up_blocks: 0 to 8"):
        injected("sd15", unet, blocks=[3])


def test_settings_of_an_adapter_reach_peft() -> None:
    network = sd15.PARTS["sd15"]()["unet"]
    model = injected("sd15", network, kind="dora", rank=3, alpha=6.0, rslora=True, dropout=0.25)
    config = model.peft_config["default"] if hasattr(model, "peft_config") else None
    layer = model.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert layer.scaling["default"] == pytest.approx(6 / 3**0.5)
    assert layer.use_dora["default"] and layer.lora_dropout["default"].p == 0.25
    assert config is None or config.use_rslora


def test_a_dropout_of_everything_is_refused(run_config: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(with_adapter(run_config, dropout=1)))
    with pytest.raises(ConfigError, match=r"adapter\.dropout=1\.0: must be a number in \[0, 1\)"):
        load_options(file)
