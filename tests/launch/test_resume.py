"""``--resume``: a run that was stopped ends where one that was not ends, in its weights and in its
files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_layerlr.checkpoint.manifest import read_manifest
from launch import train
from tests.support.ranks import run_ranks

FINAL = Path("final/diffusion_pytorch_model.safetensors")
Call = list[str]


def call_all(
    rank: int, world_size: int, calls: list[Call], stop_after: int | None
) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each call; the first is stopped by SIGTERM in the given step."""
    from launch.trainer import loop

    accumulate, done = loop._accumulate, 0

    def interrupted(*args: Any) -> float:
        nonlocal done
        done += 1
        if done == stop_after and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args)

    loop._accumulate = interrupted
    train.stop = lambda: None  # one process group for all calls
    results = []
    for call in calls:
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            results.append((train.main(call), said.getvalue(), complained.getvalue()))
    return results


@pytest.fixture
def call(
    run_config: dict[str, Any], write_config: Callable[..., Path], tmp_path: Path
) -> Callable[..., Call]:
    run_config["train"]["steps"] = 6
    config = str(write_config(run_config))

    def make(out: str, *more: str) -> Call:
        return ["--config", config, "--output-dir", str(tmp_path / out), *more]

    return make


def rows(folder: Path) -> list[dict[str, Any]]:
    timed = (
        "s_per_step",
        "peak_memory_gb",
        "samples_per_s",
        "tokens_per_s",
        "data_wait_s",
        "eta_s",
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def folders(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


def test_a_stopped_run_resumes_to_the_same_weights_and_rows(
    call: Callable[..., Call], tmp_path: Path
) -> None:
    every = (
        "--set",
        "train.save_every=2",
        "--set",
        "train.keep=2",
        "--set",
        "train.background_save=true",
    )
    calls = [
        call("halves", *every, "--resume", "latest"),  # stopped in step 3
        call("halves", *every, "--resume", "latest"),
        call("whole"),
        call("halves", *every),
        call("halves", *every, "--resume", "latest"),
        call("halves", *every, "--resume", "latest", "--max-steps", "5"),
        call("halves", *every, "--resume", "nowhere"),
    ]
    (stopped, resumed, whole, fresh, done, shorter, nowhere) = run_ranks(call_all, 1, calls, 3)[0]
    assert (stopped[0], resumed[0], whole[0]) == (0, 0, 0)
    assert (
        "yet: starting at step 0" in stopped[1]
        and "stopped by a signal after 3 steps" in stopped[1]
    )
    assert "step_00000003 after 3 steps" in resumed[1] and "finished 6 steps" in resumed[1]
    once, twice = load_file(tmp_path / "whole" / FINAL), load_file(tmp_path / "halves" / FINAL)
    assert all(torch.equal(once[name], twice[name]) for name in once.keys() | twice.keys())
    assert rows(tmp_path / "halves") == rows(tmp_path / "whole")
    assert folders(tmp_path / "halves") == ["latest", "step_00000004", "step_00000006"]
    first_lrs = [
        json.loads((tmp_path / out / "verify.json").read_text())["first_step_lr"]
        for out in ("whole", "halves")
    ]
    assert first_lrs[0] == first_lrs[1] != {}
    assert (
        fresh[0] == 2
        and "it holds checkpoints of an earlier run. Continue it with --resume latest" in fresh[2]
    )
    assert done[0] == 0 and "is after 6 of 6 steps" in done[1]
    assert shorter[0] == 2 and "Invalid train.steps=5: must be at least 6" in shorter[2]
    assert nowhere[0] == 2 and "No checkpoint in 'nowhere'" in nowhere[2]


def test_another_sharding_ranks_and_plan_continue_a_run(
    call: Callable[..., Call], tmp_path: Path
) -> None:
    half = ("--set", "train.save_every=3", "--max-steps", "3", "--set", "schedule.type=constant")
    rest = ("--resume", str(tmp_path / "half" / "checkpoints"), "--set", "schedule.type=constant")
    new = ("--set", "per_layer_lr.component_lr.ffn=6e-4")
    kept = ("--set", "per_layer_lr.resume_lr=checkpoint")
    started, whole = run_ranks(call_all, 1, [call("half", *half), call("whole", *rest[2:])], None)[
        0
    ]
    assert (started[0], whole[0]) == (0, 0)
    sharded = [
        call("fsdp2", *rest, "--sharding", "fsdp2"),
        call("new", *rest, *new, "--sharding", "fsdp1_flat"),
        call("kept", *rest, *new, *kept, "--sharding", "ddp"),
    ]
    said = run_ranks(call_all, 2, sharded, None)
    assert [s[0] for s in said[0] + said[1]] == [0] * 6, said
    wanted, same, new_rates, old_rates = (
        load_file(tmp_path / out / FINAL) for out in ("whole", "fsdp2", "new", "kept")
    )
    assert max(float((wanted[n] - same[n]).abs().max()) for n in wanted) <= 1e-5
    assert max(float((wanted[n] - old_rates[n]).abs().max()) for n in wanted) <= 1e-5
    assert max(float((wanted[n] - new_rates[n]).abs().max()) for n in wanted) > 1e-4
    assert "blocks.000-002.ffn: lr 0.00015..0.0003 -> 0.0003..0.0006 (x2)" in said[0][1][1]
    assert (
        "the new rates apply (resume_lr)" in said[0][1][1]
        and "its rates apply (resume_lr)" in said[0][2][1]
    )


def test_another_runs_checkpoint_starts_files_of_its_own_and_spares_other_checkpoints(
    call: Callable[..., Call], tmp_path: Path
) -> None:
    source = tmp_path / "source" / "checkpoints"
    every = (
        "--set",
        "train.save_every=1",
        "--set",
        "train.keep=2",
        "--set",
        "schedule.type=constant",
    )
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text('{"step": 0, "loss": 777}\n')
    calls = [
        call("source", *every, "--max-steps", "2"),
        call("used", *every, "--max-steps", "3", "--resume", str(source)),
        call("used", *every, "--max-steps", "4", "--resume", str(source)),
        call(
            "used",
            *every,
            "--max-steps",
            "4",
            "--resume",
            str(tmp_path / "used" / "checkpoints" / "step_00000003"),
        ),
    ]
    said = run_ranks(call_all, 1, calls, None)[0]
    assert [status for status, _, _ in said] == [0, 0, 2, 0], said
    assert "it holds checkpoints of an earlier run. Continue it with --resume latest" in said[2][2]
    assert [row["step"] for row in rows(tmp_path / "used")] == [2, 3]
    newest = source / "step_00000002"
    replace(read_manifest(newest), extra={}).write(newest)
    foreign = run_ranks(call_all, 1, [call("new", *every, "--resume", str(source))], None)[0]
    assert foreign[0][0] == 2 and "train.py did not write it" in foreign[0][2]


def contents(out: Path) -> dict[str, bytes]:
    """All that a run has left, but for the note of who holds the folder."""
    found = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if ".lock" not in name}


def test_a_relaunch_that_trains_nothing_leaves_plan_proof_and_result_of_what_was_trained(
    call: Callable[..., Call], tmp_path: Path
) -> None:
    run = ("--set", "train.save_every=6", "--resume", "latest")
    other = (*run, "--set", "per_layer_lr.component_lr.ffn=9e-4", "--set", "samples.count=1")
    out = tmp_path / "out"
    ((status, _, _),) = run_ranks(call_all, 1, [call("out", *run)], None)[0]
    assert status == 0
    trained = contents(out)
    ((status, said, _),) = run_ranks(call_all, 1, [call("out", *other)], None)[0]
    assert status == 0 and said.count("\n") == 1
    assert said.startswith(f"nothing to train: {out}/checkpoints/step_00000006 is after 6 of 6")
    assert contents(out) == trained
    # Ended between its last checkpoint and its result: that is made, and by the rates of then.
    shutil.rmtree(out / "final")
    (out / "verify.json").unlink()
    ((status, said, complained),) = run_ranks(call_all, 1, [call("out", *other)], None)[0]
    assert status == 0, complained
    assert "its rates apply (no step is left to train at others)" in said
    made = contents(out)
    for name in ("plan.json", "final/plan.json", "run.json", "resolved_config.json", str(FINAL)):
        assert made[name] == trained[name], name
    digest = json.loads(trained["plan.json"])["digest"]
    assert json.loads(made["final/verify.json"])["end"]["digest"] == digest


def test_the_weights_of_an_adapter_are_not_written_beside_settings_that_were_not_trained(
    call: Callable[..., Call], tmp_path: Path
) -> None:
    lora = ("--set", "training_method=lora", "--set", "train.save_every=6", "--resume", "latest")
    out = tmp_path / "out"
    ((status, _, _),) = run_ranks(call_all, 1, [call("out", *lora, "--max-steps", "6")], None)[0]
    assert status == 0
    shutil.rmtree(out / "final")
    louder = call("out", *lora, "--set", "adapter.alpha=99")
    ((status, _, complained),) = run_ranks(call_all, 1, [louder], None)[0]
    assert status == 2 and not (out / "final").exists()
    assert "Invalid adapter: lora_alpha=99.0, but" in complained
    assert "was trained with 16" in complained and "no step is left to train" in complained


def test_a_result_of_another_start_with_the_same_plan_and_steps_is_replaced(
    call: Callable[..., Call], tmp_path: Path
) -> None:
    """The second run has all its steps but not its result, and the folder still holds the first's:
    same plan, same step, other weights."""
    out = tmp_path / "out"
    first = call("out", "--set", "train.seed=1")
    second = call("out", "--set", "train.save_every=6")
    calls = [first, second]
    assert [s for s, _, _ in run_ranks(call_all, 1, calls, None)[0]] == [0, 0]
    wanted = load_file(out / FINAL)
    shutil.rmtree(out / "final")
    shutil.copytree(out / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(out / "checkpoints")
    assert run_ranks(call_all, 1, [first], None)[0][0][0] == 0
    shutil.copytree(tmp_path / "checkpoints", out / "checkpoints")
    ((status, said, _),) = run_ranks(call_all, 1, [[*second, "--resume", "latest"]], None)[0]
    assert status == 0 and "finished 6 steps" in said
    found = load_file(out / FINAL)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_stop_before_the_first_step_leaves_the_earlier_result(
    call: Callable[..., Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launch.trainer import run

    sizes = run._sizes

    def interrupted(*args: Any) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return sizes(*args)

    assert run_ranks(call_all, 1, [call("out")], None)[0][0][0] == 0
    trained = contents(tmp_path / "out" / "final")
    monkeypatch.setattr(run, "_sizes", interrupted)
    ((status, said, _),) = run_ranks(call_all, 1, [call("out")], None)[0]
    assert status == 0 and "stopped by a signal before step 1; nothing new to save" in said
    assert contents(tmp_path / "out" / "final") == trained
