"""Every launch script: valid bash, the command it starts, the plan it prints, and one real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr.errors import ConfigError
from launch import train
from launch.trainer.engines.sharding import SHARDINGS, check_accelerate_env

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
STARTS = {
    "run.sh ddp": ("torchrun", "--sharding ddp"),
    "run.sh fsdp1": ("torchrun", "--sharding fsdp1"),
    "run.sh fsdp1_flat": ("torchrun", "--sharding fsdp1_flat"),
    "run.sh fsdp2": ("torchrun", "--sharding fsdp2"),
    "run.sh hsdp": ("torchrun", "--sharding hsdp"),
    "run.sh zero": ("torchrun", "ds_configs/zero2.json"),
    "LAUNCHER=deepspeed run.sh zero": ("deepspeed", "ds_configs/zero2.json"),
    "LAUNCHER=accelerate run.sh fsdp2": ("accelerate", "--sharding fsdp2"),
    "slurm.sbatch": ("srun", ""),
}
"""Script and sharder: what it starts, and what that is told."""
SCRIPTS = ("run.sh", "slurm.sbatch")
SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[0-1]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "3",
    "SLURM_CPUS_PER_TASK": "12",
}


def call(
    start: str, *args: str, first: Path = BIN, cwd: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``[VARIABLE=value] SCRIPT [SHARDER]`` from some other folder, with ``first`` in front of
    PATH."""
    path = os.pathsep.join([str(first), str(BIN), os.environ["PATH"]])
    clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    words = start.split()
    env |= dict(word.split("=") for word in words if "=" in word)
    script, *sharder = (word for word in words if "=" not in word)
    return subprocess.run(
        ["bash", str(LAUNCH / script), *sharder, *args],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=cwd,
        env={**clean, "PATH": path, "PYTHON": sys.executable, **env},
    )


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Launchers that print how they were called."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in ("torchrun", "deepspeed", "accelerate", "srun"):
        (folder / name).write_text(f'#!/usr/bin/env bash\necho "{name} $* OMP=$OMP_NUM_THREADS"\n')
    (folder / "args").write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (folder / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'node0\\nnode1\\n'\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    return folder


def test_every_script_is_listed_here() -> None:
    found = {p.name for p in [*LAUNCH.glob("run*.sh"), *LAUNCH.glob("*.sbatch")]}
    assert found == set(SCRIPTS)
    started = {start.split()[-1] for start in STARTS if "run.sh" in start}
    assert started == SHARDINGS.keys() - {"none"}  # which starts no ranks


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_valid_short_and_shows_three_calls(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    lines = (LAUNCH / script).read_text().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert "set -euo pipefail" in lines
    assert sum(line.startswith("#   ") for line in lines) == 3


@pytest.mark.parametrize("script", STARTS)
def test_script_starts_its_launcher_and_passes_arguments_through(
    script: str, stubs: Path, tmp_path: Path
) -> None:
    launcher, told = STARTS[script]
    done = call(
        script, "--config", "a b.json", "--set", "x=1", first=stubs, cwd=tmp_path, NGPU="3", **SLURM
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{launcher} ") and told in line
    assert f"{LAUNCH}/train.py" in line and "--config a b.json --set x=1" in line
    counts = ("--nproc_per_node 3", "--num_gpus 3", "--num_processes 3")
    assert any(count in line for count in counts), line


def test_slurm_job_meets_on_the_first_node_and_shares_its_cores(
    stubs: Path, tmp_path: Path
) -> None:
    line = call("slurm.sbatch", "--config", "c.json", first=stubs, cwd=tmp_path, **SLURM).stdout
    assert line.startswith("srun torchrun --nnodes 2 --nproc_per_node 3 --rdzv_backend c10d")
    assert "--rdzv_endpoint node0:23456 --rdzv_id 123456" in line
    assert line.endswith("OMP=4\n")


def test_a_stopped_job_has_longer_than_torchs_30_seconds_to_save(
    stubs: Path, tmp_path: Path
) -> None:
    for name in ("torchrun", "srun", "accelerate"):
        (stubs / name).write_text("#!/usr/bin/env bash\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n")
    # DeepSpeed's launcher knows no such time.
    for start in (start for start, (launcher, _) in STARTS.items() if launcher != "deepspeed"):
        assert call(start, first=stubs, cwd=tmp_path, **SLURM).stdout == "270\n"
        assert call(start, first=stubs, cwd=tmp_path, STOP_S="5", **SLURM).stdout == "5\n"
    assert "SHUTDOWN_TIMEOUT=${STOP_S:-270}" in (LAUNCH / "quickstart.sh").read_text()


def test_one_process_needs_no_launcher(stubs: Path, tmp_path: Path) -> None:
    done = call("run.sh none", "--max-steps", "1", cwd=tmp_path, PYTHON=str(stubs / "args"))
    program, *arguments = done.stdout.splitlines()
    assert program == str(LAUNCH / "train.py")
    assert arguments == ["--sharding", "none", "--max-steps", "1"]


def test_hsdp_on_two_machines_meets_where_it_is_told(stubs: Path, tmp_path: Path) -> None:
    done = call("run.sh hsdp", first=stubs, cwd=tmp_path, NNODES="2", HEAD="node0:29500")
    assert (
        "--nnodes 2 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint node0:29500"
        in done.stdout
    )


@pytest.mark.parametrize("script", STARTS)
def test_dry_run_prints_the_plan_and_starts_nothing(
    script: str,
    run_config: dict[str, Any],
    write_config: Callable[..., Path],
    stubs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = call(
        script,
        "--config",
        str(write_config(run_config)),
        cwd=tmp_path,
        DRY_RUN="1",
        PYTHON=str(stubs / "args"),
    )
    program, *arguments = told.stdout.splitlines()
    assert program == str(LAUNCH / "train.py")
    assert train.main(arguments) == 0  # in this process: starting one for each script takes long
    out = capsys.readouterr().out
    assert (
        out.startswith("[per_layer_lr] model_type=wan strategy=cosine")
        and "blocks.000-002.self_attn" in out
    )
    assert not (tmp_path / "runs").exists()


def test_dry_run_needs_nothing_but_python(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    done = call(
        "run.sh fsdp2", "--config", str(write_config(run_config)), cwd=tmp_path, DRY_RUN="1"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[per_layer_lr] model_type=wan strategy=cosine")


def test_accelerate_starts_ranks_that_train(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> None:
    run_config["train"]["steps"] = 2
    config = str(write_config(run_config))
    done = call(
        "LAUNCHER=accelerate run.sh fsdp2",
        "--config",
        config,
        "--output-dir",
        str(tmp_path / "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "verified on 2 ranks (fsdp2)" in done.stdout
    assert "finished 2 steps" in done.stdout
    assert json.loads((tmp_path / "out" / "verify.json").read_text())["end"]["ranks"] == 2


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
MEGATRON = {"ACCELERATE_USE_MEGATRON_LM": "true"}


@pytest.mark.parametrize(
    ("env", "sharding", "says"),
    [
        (
            DEEPSPEED,
            "fsdp2",
            "Invalid --sharding fsdp2: accelerate launch was told --use_deepspeed",
        ),
        (DEEPSPEED, "none", "Pass --deepspeed_config FILE"),
        (FSDP1, "fsdp2", "--use_fsdp --fsdp_version 1"),
        (FSDP1, "ddp", "Pass --sharding fsdp1 to train.py"),
        (FSDP2, "fsdp1", "Pass --sharding fsdp2 to train.py"),
        (
            FSDP2,
            "zero",
            "Invalid --deepspeed_config: accelerate launch was told --use_fsdp --fsdp_version 2",
        ),
        ({"ACCELERATE_USE_FSDP": "1"}, "fsdp2", "--fsdp_version 1"),
        (MEGATRON, "ddp", "--use_megatron_lm"),
    ],
)
def test_accelerate_options_that_contradict_the_sharding_are_refused(
    env: dict[str, str], sharding: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        check_accelerate_env(SHARDINGS[sharding])
    assert says in str(error.value) and "--multi_gpu" in str(error.value)


@pytest.mark.parametrize(
    ("env", "sharding"),
    [
        ({}, "none"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}, "fsdp2"),
        (DEEPSPEED, "zero"),
        (FSDP1, "fsdp1_flat"),
        (FSDP2, "hsdp"),
    ],
)
def test_accelerate_options_that_agree_are_accepted(
    env: dict[str, str], sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    check_accelerate_env(SHARDINGS[sharding])
