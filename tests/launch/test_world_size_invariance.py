"""The same config and global batch end in the same weights, whatever the launcher, sharder and
number of ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.support.jobs import (
    ROOT,
    TORCHRUN,
    TRAIN,
    as_lora,
    call_of,
    largest_difference,
    run,
    run_in_ranks,
    weights,
)

NATIVE = ("ddp", "fsdp1", "fsdp1_flat", "fsdp2", "hsdp")
FLAGS = {
    **{f"{name} on 2 ranks": ["--sharding", name] for name in NATIVE},
    "fsdp2 on 4 ranks": ["--sharding", "fsdp2"],
    **{
        f"zero {stage} on 2 ranks": [
            "--deepspeed_config",
            str(ROOT / "ds_configs" / f"zero{stage}.json"),
        ]
        for stage in range(4)
    },
}
"""What train.py is told under each label, whatever starts it."""
LAUNCHED = {"full finetune": ["fsdp2 on 2 ranks"], "lora": ["zero 2 on 2 ranks"]}
"""By default one run of torchrun and one of deepspeed; each label by `-m full`."""


def ranks_of(label: str) -> int:
    return int(label.split(" on ")[1].split()[0])


def launcher_of(label: str) -> list[str]:
    """The command that a user types."""
    if "--deepspeed_config" in FLAGS[label]:
        return ["deepspeed", "--num_gpus", str(ranks_of(label)), TRAIN, *FLAGS[label]]
    return [*TORCHRUN, str(ranks_of(label)), TRAIN, *FLAGS[label]]


def config_of(method: str, run_config: dict[str, Any]) -> dict[str, Any]:
    config = as_lora(run_config) if method == "lora" else run_config
    config["train"]["micro_batch"] = 2
    return config


def check(label: str, said: str, reference: dict[str, Any], folder: Path) -> None:
    sharder, ranks = label.replace("hsdp", "fsdp2").split(" on ")
    assert f"verified on {ranks} ({sharder})" in said
    assert largest_difference(reference, weights(folder)) <= 1e-5, label


def train_alone(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Weights of one process; fails if three times the rate of one component is not far away."""
    louder = copy.deepcopy(config)
    louder["per_layer_lr"]["component_lr"]["self_attn"] *= 3
    flags = ["--sharding", "none"]
    calls = [call_of(config, folder / "none", *flags), call_of(louder, folder / "louder", *flags)]
    for ended in run_in_ranks(1, calls):
        assert ended.status == 0, ended.complaint
    reference = weights(folder / "none")
    assert largest_difference(reference, weights(folder / "louder")) > 1e-3
    return reference


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Weights of one process by method: the first test that trains it lends them to the others."""
    return {}


@pytest.mark.parametrize("method", ["full finetune", "lora"])
def test_final_weights_do_not_depend_on_sharder_or_world_size(
    method: str, run_config: dict[str, Any], tmp_path: Path, alone: dict[str, Any]
) -> None:
    config = config_of(method, run_config)
    reference = alone[method] = train_alone(config, tmp_path)
    for ranks in (2, 4):
        labels = [label for label in FLAGS if ranks_of(label) == ranks]
        calls = [call_of(config, tmp_path / label, *FLAGS[label]) for label in labels]
        for label, ended in zip(labels, run_in_ranks(ranks, calls), strict=True):
            assert ended.status == 0, f"{label}:\n{ended.said}\n{ended.complaint}"
            check(label, ended.said, reference, tmp_path / label)


@pytest.mark.parametrize(
    ("method", "launches"),
    [
        pytest.param("full finetune", LAUNCHED["full finetune"], id="full finetune"),
        pytest.param("lora", LAUNCHED["lora"], id="lora"),
        *(
            pytest.param(method, list(FLAGS), marks=pytest.mark.full, id=f"{method}, all")
            for method in LAUNCHED
        ),
    ],
)
def test_final_weights_do_not_depend_on_launcher_sharder_or_world_size(
    method: str,
    launches: list[str],
    run_config: dict[str, Any],
    tmp_path: Path,
    alone: dict[str, Any],
) -> None:
    config = config_of(method, run_config)
    reference = alone.get(method) or train_alone(config, tmp_path)
    for label in launches:
        done = run(launcher_of(label), config, tmp_path / label)
        assert done.returncode == 0, f"{label}:\n{done.stdout}\n{done.stderr}"
        check(label, done.stdout, reference, tmp_path / label)


def test_a_run_leaves_everything_it_promises(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_config["samples"] = {"count": 2, "steps": 2}
    run_config["train"]["steps"] = 2
    (done,) = run_in_ranks(1, [call_of(run_config, tmp_path)])
    assert done.status == 0, done.complaint
    out = tmp_path / "out"
    plan = json.loads((out / "plan.json").read_text())
    proof = json.loads((out / "verify.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1]
    assert proof["start"]["digest"] == proof["end"]["digest"] == plan["digest"]
    assert proof["start"]["parameters"] == len(plan["parameters"])
    with safe_open(
        str(out / "final" / "diffusion_pytorch_model.safetensors"), framework="pt"
    ) as file:
        assert file.metadata()["plan_digest"] == plan["digest"]
        assert set(file.keys()) == set(plan["parameters"])
    for picture in ("lr_grid.png", "samples/samples.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert done.said.startswith(
        "[per_layer_lr] model_type=wan strategy=cosine min_depth_factor=0.5 groups="
    )


def test_exported_folders_load_with_diffusers_and_peft(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel
    from peft import PeftModel

    run_config["train"]["steps"] = 1
    configs = {"full": run_config, "lora": as_lora(run_config)}
    calls = [call_of(config, tmp_path / name) for name, config in configs.items()]
    for done in run_in_ranks(1, calls):
        assert done.status == 0, done.complaint
    trained = WanTransformer3DModel.from_pretrained(tmp_path / "full" / "out" / "final")
    assert largest_difference(weights(tmp_path / "full"), dict(trained.state_dict())) == 0.0
    base = WanTransformer3DModel.from_pretrained(run_config["model_path"])
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora" / "out" / "final")
    live = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert largest_difference(weights(tmp_path / "lora"), live) == 0.0
