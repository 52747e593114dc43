"""Variants of the video families, which have no model type of their own, trained from a pipeline
folder: one process and two ranks end in the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.jobs import ROOT, Ended, call_of, largest_difference, run_in_ranks, weights
from tests.support.oracle import noise

ZERO2 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")]
SHARDERS = {"none": (1, []), "ddp": (2, ["--sharding", "ddp"]), "zero 2": (2, ZERO2)}
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "wan_i2v": ("wan", {}, "lora"),
    "wan22_i2v": ("wan22", {"expert": "low"}, "lora"),
    "wan22_5b": ("wan22", {"first_frame": 0.5}, "lora"),
    "ltx2_5": ("ltx2", {}, "full"),
    "ltx2_3": ("ltx2", {"audio": False, "first_frame": 0.5}, "full"),
}
"""Tiny pipeline -> model type, objective, method. 2.5 has a name without gradient in any run, 2.3
without sound has many."""


def sample_of(variant: str, number: int) -> Mapping[str, torch.Tensor]:
    def drawn(place: int, *shape: int) -> torch.Tensor:
        return noise(100 * number + place, *shape)

    sample = {"latents": drawn(0, 4, 3, 2, 4), "prompt_embeds": drawn(1, 512, 16)}
    if variant.endswith("i2v"):
        sample["condition"] = drawn(2, 4, 3, 2, 4)
    if variant == "wan_i2v":
        sample["image_embeds"] = drawn(3, 5, 8)
    if variant.startswith("ltx2"):
        sample["prompt_embeds"] = drawn(1, 6, 24)
        sample["audio_prompt_embeds"] = drawn(4, 6, 16)
        sample["fps"] = torch.tensor(12.0)
    if variant == "ltx2_5":
        # The second sample of each batch is silent.
        sample["audio_latents"] = drawn(5, 19, 4)
        sample["has_audio"] = torch.tensor(number % 2 == 0)
    return sample


def config_of(variant: str, root: Path) -> dict[str, Any]:
    model_type, objective, method = VARIANTS[variant]
    adapter = {"adapter": {"type": "lora", "rank": 2, "alpha": 2}} if method == "lora" else {}
    return {
        "model_type": model_type,
        "model_path": str(root / variant),
        "training_method": "lora" if adapter else "fine_tune",
        "learning_rate": 1e-3,
        "per_layer_lr": {"enabled": True, "component_lr": {"self_attn": 2e-3}},
        "data": {"kind": "cached", "folder": str(root / f"{variant}_cache")},
        "objective": objective,
        # AdamW makes a whole step of a gradient that is nothing but rounding, unless eps is larger.
        "optimizer": {"eps": 1e-5},
        "train": {"steps": 3, "global_batch": 2},
        "samples": {"count": 1, "steps": 2},
        **adapter,
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], Ended]]:
    from launch.trainer.tiny import build

    root, found = tmp_path_factory.mktemp("variants"), {}
    for variant in VARIANTS:
        build(variant).save_pretrained(root / variant)
        (root / f"{variant}_cache").mkdir()
        for number in range(4):
            file = root / f"{variant}_cache" / f"{number}.safetensors"
            save_file(dict(sample_of(variant, number)), file)
    for ranks in (1, 2):
        sharders = [name for name, (count, _) in SHARDERS.items() if count == ranks]
        keys = [(variant, sharder) for sharder in sharders for variant in VARIANTS]
        calls = []
        for variant, sharder in keys:
            config, folder = config_of(variant, root), root / f"{variant}-{sharder}"
            calls.append(call_of(config, folder, *SHARDERS[sharder][1]))
        found.update(zip(keys, run_in_ranks(ranks, calls), strict=True))
    return root, found


@pytest.mark.parametrize("sharder", SHARDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_and_samples_and_its_plan_is_verified(
    variant: str, sharder: str, ended: tuple[Path, dict[tuple[str, str], Ended]]
) -> None:
    root, runs = ended
    run = runs[variant, sharder]
    assert run.status == 0, run.complaint
    out = root / f"{variant}-{sharder}" / "out"
    assert (out / "samples" / "samples.png").stat().st_size > 1000
    assert json.loads((out / "final" / "verify.json").read_text())["first_step_lr"]
    alone, shared = weights(root / f"{variant}-none"), weights(root / f"{variant}-{sharder}")
    assert largest_difference(alone, shared) <= 1e-5


@pytest.mark.parametrize(("variant", "frozen"), [("ltx2_5", 1), ("ltx2_3", 153)])
def test_names_without_a_gradient_are_frozen_and_said(
    variant: str, frozen: int, ended: tuple[Path, dict[tuple[str, str], Ended]]
) -> None:
    said = ended[1][variant, "ddp"].said
    line = next(line for line in said.splitlines() if line.startswith("frozen, because"))
    assert line.endswith(f"and {frozen - 1} more") == (frozen > 1), line
