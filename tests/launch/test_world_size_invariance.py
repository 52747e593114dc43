"""The same config and global batch end in the same weights, whatever the launcher, sharder and
number of ranks."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent
TORCHRUN = ["torchrun", "--nproc_per_node"]
DEEPSPEED = ["deepspeed", "--num_gpus", "2", TRAIN, "--deepspeed_config"]
LAUNCHES = {
    "ddp on 2 ranks": [*TORCHRUN, "2", TRAIN, "--sharding", "ddp"],
    "fsdp1 on 2 ranks": [*TORCHRUN, "2", TRAIN, "--sharding", "fsdp1"],
    "fsdp1 flat on 2 ranks": [*TORCHRUN, "2", TRAIN, "--sharding", "fsdp1_flat"],
    "fsdp2 on 2 ranks": [*TORCHRUN, "2", TRAIN, "--sharding", "fsdp2"],
    "fsdp2 on 4 ranks": [*TORCHRUN, "4", TRAIN, "--sharding", "fsdp2"],
    "hsdp on 2 ranks": [*TORCHRUN, "2", TRAIN, "--sharding", "hsdp"],
    **{
        f"zero {stage} on 2 ranks": [*DEEPSPEED, str(ROOT / "ds_configs" / f"zero{stage}.json")]
        for stage in range(4)
    },
}
LORA = ("ddp on 2 ranks", "fsdp2 on 2 ranks", "zero 2 on 2 ranks")
FULL = (*LORA, "fsdp2 on 4 ranks")
"""By default; the other launches by `-m full`."""
PORTS = iter(range(29610, 29700))


def run(
    command: list[str], config: dict[str, Any], folder: Path
) -> subprocess.CompletedProcess[str]:
    """Run the main job as a user would, in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    program = [str(BIN / command[0]), f"--master_port={next(PORTS)}", *command[1:]]
    if command[0] == "python":
        program = [sys.executable, *command[1:]]
    env = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*program, "--config", str(file), "--output-dir", str(folder / "out")],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=folder,
    )
    return done


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "out" / "final").glob("*.safetensors")
    return load_file(str(file))


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def as_lora(config: dict[str, Any]) -> dict[str, Any]:
    lora = {"type": "lora", "rank": 4, "alpha": 4}
    return {
        **config,
        "training_method": "lora",
        "adapter": lora,
        "per_layer_lr": {
            **{k: v for k, v in config["per_layer_lr"].items() if k != "no_decay"},
            "lora_plus_ratio": 4,
        },
    }


def _but(labels: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(label for label in LAUNCHES if label not in labels)


@pytest.mark.parametrize(
    ("method", "launches"),
    [
        pytest.param("full finetune", FULL, id="full finetune"),
        pytest.param("lora", LORA, id="lora"),
        pytest.param(
            "full finetune", _but(FULL), marks=pytest.mark.full, id="full finetune, others"
        ),
        pytest.param("lora", _but(LORA), marks=pytest.mark.full, id="lora, others"),
    ],
)
def test_final_weights_do_not_depend_on_launcher_sharder_or_world_size(
    method: str, launches: tuple[str, ...], run_config: dict[str, Any], tmp_path: Path
) -> None:
    config = as_lora(run_config) if method == "lora" else run_config
    config["train"]["micro_batch"] = 2
    alone = run(["python", TRAIN, "--sharding", "none"], config, tmp_path / "none")
    assert alone.returncode == 0, alone.stderr
    reference = weights(tmp_path / "none")
    for label in launches:
        done = run(LAUNCHES[label], config, tmp_path / label)
        assert done.returncode == 0, f"{label}:\n{done.stdout}\n{done.stderr}"
        sharder, ranks = label.replace("hsdp", "fsdp2").split(" on ")
        assert f"verified on {ranks} ({sharder})" in done.stdout
        assert largest_difference(reference, weights(tmp_path / label)) <= 1e-5, label

    # The check can fail: three times the rate of one component is far outside the bar.
    louder = copy.deepcopy(config)
    louder["per_layer_lr"]["component_lr"]["self_attn"] *= 3
    assert run(["python", TRAIN, "--sharding", "none"], louder, tmp_path / "louder").returncode == 0
    assert largest_difference(reference, weights(tmp_path / "louder")) > 1e-3


def test_a_run_leaves_everything_it_promises(run_config: dict[str, Any], tmp_path: Path) -> None:
    run_config["samples"] = {"count": 2, "steps": 2}
    run_config["train"]["steps"] = 2
    done = run(["python", TRAIN], run_config, tmp_path)
    assert done.returncode == 0, done.stderr
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
    assert done.stdout.startswith(
        "[per_layer_lr] model_type=wan strategy=cosine min_depth_factor=0.5 groups="
    )


def test_exported_folders_load_with_diffusers_and_peft(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel
    from peft import PeftModel

    run_config["train"]["steps"] = 1
    for name, config in (("full", run_config), ("lora", as_lora(run_config))):
        done = run(["python", TRAIN], config, tmp_path / name)
        assert done.returncode == 0, done.stderr
    trained = WanTransformer3DModel.from_pretrained(tmp_path / "full" / "out" / "final")
    assert largest_difference(weights(tmp_path / "full"), dict(trained.state_dict())) == 0.0
    base = WanTransformer3DModel.from_pretrained(run_config["model_path"])
    adapted = PeftModel.from_pretrained(base, tmp_path / "lora" / "out" / "final")
    live = {n.replace(".default", ""): p for n, p in adapted.named_parameters() if "lora_" in n}
    assert largest_difference(weights(tmp_path / "lora"), live) == 0.0
