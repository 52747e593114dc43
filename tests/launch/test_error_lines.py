"""A wrong config is one line under every launcher, on any number of ranks, and nobody hangs.

A launcher ends all ranks when the first one leaves. Here the rank that says the error comes last,
as it does by chance in about half of all launches.
"""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launch.test_bad_input import CASES
from tests.support.jobs import BIN, DEADLINE_S, ROOT, TRAIN, call_of, free_port

LATE_S = 2.0
"""How much later than the others the first rank starts: about half as long as they need to fail."""
LATE = f"""
import os, time
if os.environ.get("LOCAL_RANK") == "0":
    time.sleep({LATE_S})
"""
SHARDED = ["--sharding", "fsdp2"]
ZERO = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")]


def command(launcher: str, ranks: int) -> list[str]:
    if launcher == "deepspeed":
        port = f"--master_port={free_port()}"
        return ["deepspeed", "--num_gpus", str(ranks), port, TRAIN, *ZERO]
    if launcher == "accelerate":
        plain = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
        count = ["--multi_gpu", "--num_processes", str(ranks), "--main_process_port", "0"]
        return ["accelerate", "launch", *count, *plain, TRAIN, *SHARDED]
    return ["torchrun", "--standalone", "--nproc_per_node", str(ranks), TRAIN, *SHARDED]


def launch(
    launcher: str, ranks: int, case: str, config: dict[str, Any], folder: Path, late: bool = True
) -> str:
    """Start a wrong config, which must end by itself and not well. Returns standard error."""
    edit, _ = CASES[case]
    broken = copy.deepcopy(config)
    folder.mkdir(exist_ok=True)
    edit(broken, folder)
    paths = [str(ROOT)]
    if late:
        (folder / "late").mkdir()
        (folder / "late" / "sitecustomize.py").write_text(LATE)
        paths.insert(0, str(folder / "late"))
    program, *rest = command(launcher, ranks)
    done = subprocess.run(
        [str(BIN / program), *rest, *call_of(broken, folder)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
        },
        cwd=folder,
    )
    assert done.returncode != 0
    return done.stderr


def check(stderr: str, case: str) -> None:
    lines = [line for line in stderr.splitlines() if line.startswith("train.py: error: ")]
    assert len(lines) == 1, f"{case}: {len(lines)} lines:\n{stderr}"
    for text in CASES[case][1]:
        assert text in lines[0], f"{case}: {lines[0]}"


@pytest.mark.parametrize(
    ("launcher", "ranks", "case"),
    [
        ("torchrun", 2, "unknown config key"),
        ("deepspeed", 2, "negative rate"),
        ("accelerate", 2, "unknown strategy"),
    ],
)
def test_the_line_is_shown_once_though_the_first_rank_comes_last(
    launcher: str, ranks: int, case: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    check(launch(launcher, ranks, case, run_config, tmp_path), case)


LAUNCHERS = ("torchrun", "deepspeed", "accelerate")
FOR_OTHERS = {
    "batch the ranks cannot share": (1, 4, 8),
    "micro batch that does not divide": (1, 4, 8),
}
"""Cases that are none on these numbers of ranks, or are told in other words."""


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("case", CASES)
def test_every_wrong_config_is_one_line_on_any_number_of_ranks(
    case: str, ranks: int, run_config: dict[str, Any], tmp_path: Path
) -> None:
    # One launcher each, in turn, so that every one of them meets every number of ranks.
    launcher = LAUNCHERS[(list(CASES).index(case) + ranks) % len(LAUNCHERS)]
    # accelerate's --multi_gpu takes no single rank.
    if "fsdp2" in case or (launcher, ranks) == ("accelerate", 1):
        launcher = "torchrun"
    if ranks in FOR_OTHERS.get(case, ()):
        case = "unknown config key"
    check(launch(launcher, ranks, case, run_config, tmp_path, late=False), case)
