"""Every diffusion family from a pipeline folder to an adapter: cached, trained alone, under three
sharders and while streaming, sampled, exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import save_file

from launch.trainer.data.base import to_device
from launch.trainer.data.cached import EMPTY_PROMPT, CachedDataset
from launch.trainer.families import FAMILIES, get_family
from launch.trainer.families.diffusion import Diffusion, Origin
from launch.trainer.options import RunOptions, load_options
from launch.trainer.tiny import build
from tests.support.cases import items_of
from tests.support.jobs import Ended, call_of, largest_difference, run_in_ranks, weights
from tests.support.pixels import clip_of, sizes_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
SHARDERS = {
    "none": (1, []),
    "ddp": (2, ["--sharding", "ddp"]),
    "fsdp2": (2, ["--sharding", "fsdp2"]),
    "zero 2": (2, ["--deepspeed_config", ZERO2]),
}
CAPTIONS = ("a red cat", "red", "a cat runs left", "cat", "a", "runs left")
DIFFUSION = [name for name in FAMILIES if isinstance(get_family(name), Diffusion)]
FULL = ("wan", "flux_2_klein_4b", "sdxl")
"""Trained as a whole, too."""
STREAMED = ("wan", "flux_2_klein_4b", "ltx2", "sd15")
"""Their LoRA trains and samples a second time while blocks are streamed."""
STAGEHAND = {"enabled": True, "pinned_pool_mb": 64, "prefetch_window": 1, "min_numel": 100}
Cell = tuple[str, str, str]
"""(model type, method, sharder)."""
RUNS = [(name, "lora") for name in DIFFUSION] + [(name, "full") for name in FULL]
SHARED = [sharder for sharder in SHARDERS if sharder != "none"]


def cells(sharders: list[str]) -> list[Any]:
    """One case for each run and sharder."""
    found = []
    for sharder in sharders:
        for name, method in RUNS:
            found.append(pytest.param((name, method, sharder), id=f"{sharder}-{name}-{method}"))
    return found


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What all runs have left."""

    root: Path
    ended: dict[Cell, Ended]

    def folder(self, name: str, method: str, sharder: str) -> Path:
        return self.root / f"{name}-{method}-{sharder.replace(' ', '')}"


def prepare(name: str, root: Path) -> None:
    """Write the tiny pipeline of a family, and a cache of six samples of two sizes."""
    pipeline, family = build(name), get_family(name)
    assert isinstance(family, Diffusion)
    pipeline.save_pretrained(root / name / "model")
    cache = root / name / "cache"
    cache.mkdir()
    with torch.no_grad():
        empty = family.encode_prompt(pipeline, "")
    save_file({k: v.contiguous() for k, v in empty.items()}, cache / EMPTY_PROMPT)
    for i, caption in enumerate(CAPTIONS):
        size = sizes_of(name)[i % 2]
        with torch.no_grad():
            sample = {
                **family.encode_source(pipeline, clip_of(i, *size), origin_of(i, *size)),
                **family.encode_prompt(pipeline, caption),
            }
        whole = {key: value.contiguous() for key, value in sample.items()}
        save_file(whole, cache / f"{i}.safetensors", metadata={"caption": caption})


def origin_of(seed: int, frames: int, height: int, width: int) -> Origin:
    """A clip of 24 frames per second, with sound where it is one."""
    rate = 16_000
    generator = torch.Generator().manual_seed(seed)
    sound = torch.rand(2, frames * rate // 24, generator=generator) * 2 - 1
    silent = frames == 1
    return Origin(
        size=(height, width),
        corner=(0, 0),
        fps=None if silent else 24.0,
        sound=None if silent else sound,
        rate=None if silent else rate,
    )


def config_of(name: str, method: str, root: Path) -> dict[str, Any]:
    """The shipped config, pointed at the tiny model, for three steps."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    config.pop("memory", None)
    if method == "full":
        config.pop("adapter", None)
        config["training_method"] = "fine_tune"
    else:
        config["training_method"] = "lora"
        config.setdefault("adapter", {"type": "lora", "rank": 4, "alpha": 8})
    if name == "wan22":
        # Both experts in one run are in test_experts.py: their results lie in two folders.
        config["objective"] = {"expert": "high"}
    return {
        **config,
        "model_path": str(root / name / "model"),
        "data": {"kind": "cached", "folder": str(root / name / "cache")},
        "train": {"steps": 3, "global_batch": 2, "seed": 0},
        "samples": {"count": 1, "steps": 2, "guidance": 2.0},
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Trained:
    root = tmp_path_factory.mktemp("families")
    made = Trained(root=root, ended={})
    for name in DIFFUSION:
        prepare(name, root)
    asked = {
        item.callspec.params["cell"]
        for item in items_of(request)
        if hasattr(item, "callspec") and "cell" in item.callspec.params
    }
    # What others are compared with runs in any case.
    asked |= {(name, method, "none") for name, method in RUNS}
    for world_size in (1, 2):
        calls, keys = [], []
        for cell in sorted(asked):
            name, method, sharder = cell
            ranks, flags = SHARDERS[sharder]
            if ranks == world_size:
                folder = made.folder(name, method, sharder)
                calls.append(call_of(config_of(name, method, root), folder, *flags))
                keys.append(cell)
        if world_size == 1:
            for name in STREAMED:
                config = {
                    **config_of(name, "lora", root),
                    "memory": {"stagehand": STAGEHAND},
                }
                calls.append(call_of(config, made.folder(name, "lora", "streamed")))
                keys.append((name, "lora", "streamed"))
        made.ended.update(zip(keys, run_in_ranks(world_size, calls), strict=True))
    return made


@pytest.mark.parametrize("cell", cells(list(SHARDERS)))
def test_the_shipped_config_trains_a_tiny_model_and_the_plan_is_verified(
    cell: Cell, trained: Trained
) -> None:
    ended = trained.ended[cell]
    assert ended.status == 0, ended.complaint
    assert "[per_layer_lr] verified on" in ended.said
    folder = trained.folder(*cell) / "out"
    assert (folder / "samples" / "samples.png").stat().st_size > 1000
    proof = json.loads((folder / "final" / "verify.json").read_text())
    assert proof["first_step_lr"]


@pytest.mark.parametrize("cell", cells(SHARED))
def test_ranks_change_nothing(cell: Cell, trained: Trained) -> None:
    name, method, _ = cell
    alone = weights(trained.folder(name, method, "none"))
    shared = weights(trained.folder(*cell))
    assert largest_difference(alone, shared) <= 1e-5


@pytest.mark.parametrize("name", STREAMED)
def test_streaming_changes_neither_weights_nor_samples(name: str, trained: Trained) -> None:
    ended = trained.ended[name, "lora", "streamed"]
    assert ended.status == 0, ended.complaint
    assert "[stagehand] streaming" in ended.said
    plain, streamed = (trained.folder(name, "lora", way) for way in ("none", "streamed"))
    assert largest_difference(weights(plain), weights(streamed)) == 0
    pictures = [folder / "out" / "samples" / "samples.png" for folder in (plain, streamed)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_loss_of_a_repeated_batch_falls(name: str, trained: Trained) -> None:
    family: Any = get_family(name)
    folder = trained.folder(name, "lora", "none")
    options = load_options(folder / "config.json")
    model = family.model_class.from_pretrained(options.model_path)
    still = set(family.without_gradient(model.config))
    moving = [p for n, p in model.named_parameters() if n not in still]
    loss_of = objective_of(name, options, trained.root)
    optimizer = torch.optim.AdamW(moving, lr=1e-3)
    losses = []
    for _ in range(6):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def objective_of(name: str, options: RunOptions, root: Path) -> Callable[[Any], torch.Tensor]:
    """The loss of a model on one sample of the cache, with the noise of the first step."""
    family: Any = get_family(name)
    batch = family.collate([CachedDataset(str(root / name / "cache"))[0]])
    objective = family.objective(options.objective, Path(options.model_path))
    return lambda model: objective.loss(model, to_device(batch, torch.device("cpu")), [0], 0)


@pytest.mark.parametrize("name", DIFFUSION)
@torch.no_grad()
def test_the_real_pipeline_with_the_adapter_answers_as_the_trained_model(
    name: str, trained: Trained
) -> None:
    folder = trained.folder(name, "lora", "none")
    options = load_options(folder / "config.json")
    loss_of = objective_of(name, options, trained.root)
    family: Any = get_family(name)
    model = family.model_class.from_pretrained(options.model_path).eval()
    before = loss_of(model)
    final = folder / "out" / "final"
    by_peft = loss_of(PeftModel.from_pretrained(model, str(final)).base_model.model.eval())
    assert abs(by_peft - before) > 1e-6
    pipeline = DiffusionPipeline.from_pretrained(str(trained.root / name / "model"))
    if not hasattr(pipeline, "load_lora_weights"):
        assert name == "pixart"
        return
    pipeline.load_lora_weights(str(final))
    component = "unet" if hasattr(pipeline, "unet") else "transformer"
    assert abs(loss_of(getattr(pipeline, component).eval()) - by_peft) <= 1e-6
