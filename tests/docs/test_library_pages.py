"""The blocks of docs/export.md, checkpoints.md, proof.md and audit.md, as they stand, on ranks."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_layerlr import cli
from tests.support.pages import block, blocks
from tests.support.ranks import run_ranks

SHARED = block("docs/own_trainer.md", "python", "def make_model")
LOADED = block("docs/export.md", "python", "load_pretrained(model, folder)")
EXPORTED = block("docs/export.md", "python", "export_weights(")
COMMANDS = block("docs/export.md", "bash", "dist-layerlr export")
SAVED = block("docs/checkpoints.md", "python", "resume_plan(")
(PROVEN,) = blocks("docs/proof.md", "python")
MARKED = block("docs/checkpoints.md", "python", "mark_distinct(")
(AUDITED,) = blocks("docs/audit.md", "bash")


def execute(code: str, space: dict[str, Any]) -> None:
    exec(compile(code, "docs", "exec"), space)


def load_and_export(rank: int, world_size: int, folder: str, out: str) -> None:
    """The two Python blocks of export.md, and the checkpoint that its commands start from."""
    from diffusers import WanTransformer3DModel
    from torch.distributed.fsdp import fully_shard

    import dist_layerlr

    os.chdir(out)
    space = {
        "WanTransformer3DModel": WanTransformer3DModel,
        "plan_model": dist_layerlr.plan_model,
        "fully_shard": fully_shard,
        "folder": folder,
        "device": "cpu",
        "config": {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True}},
    }
    execute(LOADED, space)
    execute(EXPORTED, space)
    plan, model = space["plan"], space["model"]
    optimizer = dist_layerlr.attach(plan, model, torch.optim.AdamW)
    dist_layerlr.save_checkpoint("full", plan, model, optimizer, step=10)


def save_adapter(rank: int, world_size: int, folder: str, out: str) -> None:
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    import dist_layerlr

    model = WanTransformer3DModel.from_pretrained(folder).requires_grad_(False)
    adapter = LoraConfig(r=2, target_modules=["to_q"])
    model.add_adapter(adapter, "default")
    config = {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True}}
    plan = dist_layerlr.plan_model(model, config)
    optimizer = dist_layerlr.attach(plan, model, torch.optim.AdamW)
    extra = {"adapter_config": {**adapter.to_dict(), "target_modules": ["to_q"]}}
    dist_layerlr.save_checkpoint(out, plan, model, optimizer, step=10, extra=extra)


def test_the_blocks_of_the_export_page_give_the_weights_back(
    tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    run_ranks(load_and_export, 2, str(tiny_wan), str(tmp_path))
    base = WanTransformer3DModel.from_pretrained(tiny_wan).state_dict()
    again = WanTransformer3DModel.from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in base.items())
    run_ranks(save_adapter, 1, str(tiny_wan), str(tmp_path / "adapter"))
    adapter, full = COMMANDS.splitlines()
    for line, saved, written in (
        (adapter, "adapter", "adapter_model.safetensors"),
        (full, "full", "model.safetensors"),
    ):
        # Each line starts from a checkpoint of its own kind.
        place = tmp_path / f"in_{saved}"
        place.mkdir()
        (place / "checkpoints").symlink_to(tmp_path / saved)
        (place / "MODEL_FOLDER").symlink_to(tiny_wan)
        monkeypatch.chdir(place)
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0, line
        assert Path("final", written).is_file(), capsys.readouterr().out
    tensors = load_file(place / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def save_and_resume(rank: int, world_size: int, folder: str) -> list[Any]:
    """The block of checkpoints.md, started and restarted."""
    import dist_layerlr

    os.chdir(folder)
    found = []
    # What the page leaves to the reader, in the two places where it says so.
    wrap = (
        "optimizer = dist_layerlr.attach(plan, model, make_adamw)\n"
        "schedule = dist_layerlr.PlanSchedule(optimizer, cosine)\n"
    )
    train = (
        "    model(batch()).square().mean().backward()\n"
        "    optimizer.step()\n"
        "    schedule.step()\n"
        "    optimizer.zero_grad()\n"
    )
    code = SAVED.replace("...  # wrap, attach, as ever\n", wrap).replace("    ...\n", train)
    assert wrap in code and train in code
    for resuming, steps in ((False, 2), (True, 5)):
        space: dict[str, Any] = {"__name__": "docs"}
        execute(SHARED, space)
        space |= {"plan_model": dist_layerlr.plan_model, "resuming": resuming, "steps": steps}
        execute(code, space)
        restored = space["restored"].step if resuming else 0
        found.append((restored, sorted(path.name for path in Path("checkpoints").glob("step_*"))))
    # The proof of proof.md is of what was trained here.
    execute(PROVEN, space)
    return [*found, space["proof"].line()]


def test_the_blocks_of_checkpoints_and_proof_run_and_resume_where_they_stopped(
    tmp_path: Path,
) -> None:
    (first, second, line), _ = run_ranks(save_and_resume, 2, str(tmp_path))
    assert first == (0, ["step_00000001", "step_00000002"])
    # Three are kept.
    assert second == (2, ["step_00000003", "step_00000004", "step_00000005"])
    assert "verified on 2 ranks" in line and "(schedule)" in line


def keep_experts(rank: int, world_size: int, folder: str) -> list[str]:
    """The line of checkpoints.md about experts that each rank has for itself."""
    import torch.distributed as dist
    from torch import nn

    import dist_layerlr
    from dist_layerlr.errors import CheckpointError

    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "experts": nn.ModuleList([nn.Linear(4, 4)])})
    with torch.no_grad():
        model["experts"][0].weight.add_(rank)
    plan = dist_layerlr.plan_model(
        model, {"learning_rate": 1e-3, "per_layer_lr": {"enabled": True}}
    )
    optimizer = dist_layerlr.attach(plan, model, torch.optim.SGD)
    said = []
    for code in ("pass", MARKED):
        execute(code, {"dist_layerlr": dist_layerlr, "model": model})
        try:
            dist_layerlr.save_checkpoint(folder, plan, model, optimizer, step=1)
            said.append("saved")
        except CheckpointError as error:
            said.append(str(error))
        dist.barrier()
    return said


def test_experts_of_each_rank_are_saved_once_they_are_marked_as_the_page_says(
    tmp_path: Path,
) -> None:
    (refused, saved), _ = run_ranks(keep_experts, 2, str(tmp_path))
    assert "experts.0.weight" in refused and saved == "saved"


SCRIPT = """\
import argparse, torch
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, required=True)
args = parser.parse_args()
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(3 * args.epochs):
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_the_command_of_the_audit_page_audits_a_script_and_finds_its_decayed_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    Path("train.py").write_text(SCRIPT)
    program, *words = shlex.split(AUDITED)
    # A warning alone is no fault; the ranks did not share their gradients, which is one.
    assert program == "dist-layerlr" and cli.main([*words[:1], "--json", "a.json", *words[1:]]) < 2
    said = capsys.readouterr().err
    assert "bias" in said and re.search(r"\bdecay\b", said)
    assert json.loads(Path("a.json").read_text())
