"""`--estimate`: what a run keeps in memory, from the model's config alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dist_layerlr import plan_model
from launch import train
from launch.trainer.activations import count_saved
from launch.trainer.ema import ema_of
from launch.trainer.engines import build_engine
from launch.trainer.engines.sharding import SHARDINGS
from launch.trainer.estimate import BUCKET, measure, rows_of
from launch.trainer.families import get_family
from launch.trainer.options import load_options
from launch.trainer.published import PUBLISHED
from launch.trainer.runtime import Runtime
from launch.trainer.weights import empty_model
from tests.support import census
from tests.support.drivers import start_deepspeed
from tests.support.extras import needs_families
from tests.support.jobs import Config, as_lora
from tests.support.living import living_bytes, only_new_tensors
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
CENSUS = {
    "chroma_1": "chroma1_hd",
    "flux_2_klein_4b": "flux2_klein_4b",
    "hunyuan_video": "hunyuan_video",
    "ltx2": "ltx2_19b",
    "pixart": "pixart_sigma_1024",
    "qwen": "qwen_image",
    "sana": "sana_1600m",
    "sd15": "sd15",
    "sd35": "sd35_medium",
    "sdxl": "sdxl",
    "zimage": "z_image",
}
SHARDERS = ("ddp", "fsdp2", "zero 1", "zero 2", "zero 3")
BIG = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 1024}
"""What is held beside such blocks does not count, and ZeRO 3 shares out matrices of this size: it
keeps those below 100,000 elements whole."""


@needs_families
@pytest.mark.parametrize("model_type", CENSUS)
def test_a_published_network_has_the_names_and_shapes_of_its_checkpoint(model_type: str) -> None:
    known = PUBLISHED[model_type]
    with torch.device("meta"):
        model = getattr(diffusers, known.class_name)(**known.config)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == {row.name: row.shape for row in census.rows(CENSUS[model_type])}


@needs_families
def test_flux_2_dev_and_klein_9b_have_as_many_names_as_their_checkpoints() -> None:
    for model_type, names in (("flux_2_dev", 331), ("flux_2_klein_9b", 233)):
        known = PUBLISHED[model_type]
        with torch.device("meta"):
            model = getattr(diffusers, known.class_name)(**known.config)
        assert sum(1 for _ in model.named_parameters()) == names


def held_after_steps(
    rank: int, world_size: int, files: list[str], batch: dict[str, torch.Tensor]
) -> dict[tuple[str, str], tuple[float, float]]:
    """Under each sharder, for each config: bytes that live after two steps, and the estimate."""
    start_deepspeed()
    found = {}
    for sharder in SHARDERS:
        for file in files:
            found[sharder, file] = held_after_a_step(rank, world_size, sharder, file, batch)
    return found


def held_after_a_step(
    rank: int, world_size: int, sharder: str, file: str, batch: dict[str, torch.Tensor]
) -> tuple[float, float]:
    runtime = Runtime(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    options = load_options(file)
    family = get_family(options.model_type)
    objective = family.objective(options.objective, Path(options.model_path))
    with only_new_tensors():
        model = empty_model(family, options)
        plan = plan_model(model, options.plan)
        rows = {row.sharder: row for row in rows_of(measure(model, plan, options), world_size, 0.0)}
        stage = sharder.removeprefix("zero ")
        config = str(ROOT / "ds_configs" / f"zero{stage}.json") if stage != sharder else None
        row = SHARDINGS["zero" if config else sharder]
        engine = build_engine(row, model, plan, options, runtime, config)
        average = ema_of(options.ema, engine)
        for step in range(2):
            with engine.micro_step(last=True):
                loss = objective.loss(engine.model, batch, [step], 0)
                engine.backward(loss)
            del loss
            engine.step(1.0)
            if average is not None:
                average.after(step + 1)
        expected = rows[sharder].weights + rows[sharder].optimizer
        if sharder == "zero 3":
            # It keeps its bucket and its share of the gradients for the next step.
            expected += rows[sharder].gradients + BUCKET
        return living_bytes(), expected


@pytest.fixture(scope="module")
def big_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big") / "wan"
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=16, freq_dim=16, num_layers=2, **BIG
    )
    model.save_pretrained(folder)
    return folder


def test_weights_and_optimizer_states_are_what_lives_after_a_step(
    big_wan: Path, run_config: Config, write_config: Callable[..., Path]
) -> None:
    batch = {"latents": torch.randn(1, 4, 1, 4, 4), "prompt_embeds": torch.randn(1, 3, 16)}
    files = []
    averaged = {**run_config, "ema": {"decay": 0.9}}
    for number, config in enumerate((run_config, as_lora(run_config), averaged)):
        config = {**config, "model_path": str(big_wan)}
        files.append(str(write_config(config, f"{number}_{config['training_method']}.json")))
    for of_rank in run_ranks(held_after_steps, 2, files, batch):
        for case, (held, estimate) in of_rank.items():
            assert held == pytest.approx(estimate, rel=0.05, abs=1.5e6), case


def test_activations_on_the_meta_device_are_those_of_a_real_forward_pass(big_wan: Path) -> None:
    def saved(device: str) -> Any:
        with torch.device(device):
            model = diffusers.WanTransformer3DModel(
                in_channels=4, out_channels=4, text_dim=16, freq_dim=16, num_layers=2, **BIG
            ).to(device)
            inputs = {
                "hidden_states": torch.zeros(2, 4, 2, 8, 8),
                "timestep": torch.zeros(2),
                "encoder_hidden_states": torch.zeros(2, 7, 16),
            }
        return count_saved(
            lambda: model(**inputs, return_dict=False)[0].square().mean(),
            model.parameters(),
            list(model.blocks),
        )

    real, meta = saved("cpu"), saved("meta")
    assert meta.total == pytest.approx(real.total, rel=0.02)
    assert meta.largest_block == pytest.approx(real.largest_block, rel=0.02)
    assert len(meta.by_block) == 2


@pytest.mark.parametrize("flags", [["--cards", "0"], ["--card-gb", "-1"]])
def test_a_number_of_cards_that_cannot_be_is_named(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(ROOT / "launch" / "configs" / "wan.json")
    assert train.main(["--config", config, "--estimate", *flags]) == 2
    assert f"Invalid {flags[0]}=" in capsys.readouterr().err


def test_the_shipped_config_says_whether_the_published_model_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(ROOT / "launch" / "configs" / "wan.json")
    more = ["--set", "train.dtype=bf16", "--set", "train.checkpointing=true"]
    assert train.main(["--config", config, "--estimate", "--card-gb", "24", *more]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Wan2.1-T2V-14B (lora; 1 x 81 frames of 832 x 480 px, bf16, checkpoint")
    rows = {line[:12].strip(): line for line in said.splitlines()[2:]}
    assert rows["ddp"].endswith("too large") and set(rows) >= {"streamed", "zero 3"}
