"""The code of README and the documentation runs: Python blocks and commands as they stand, JSON
as the reader takes it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr import build_plan, cli
from dist_layerlr.fields import settings
from dist_layerlr.plan import ParamInfo
from dist_layerlr.plan.config import PatternRule, PerLayerLR, Region
from dist_layerlr.plan.depth import DEPTH_FUNCTIONS, DepthSettings
from dist_layerlr.plan.layer_decay import CONVENTIONS
from dist_layerlr.plan.presets import PRESET_CLASSES, PRESETS, RfdetrPreset
from launch import cache_latents, make_tiny_wan, tiny, train
from tests.support.extras import needs_families
from tests.support.pages import block, blocks, lines, read
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
NEEDS_RANKS = re.compile(r"init_process_group|Accelerator\(")
WRAPPED = ["ddp", "fsdp2", "fsdp1", "fsdp1_flat", "zero 2", "zero 3", "ddp"]
"""What the blocks of own_trainer.md that need ranks say they verified, in order."""


def run_block(shared: str, code: str) -> str:
    """Run a block after the shared part. Returns what it printed."""
    space: dict[str, Any] = {"__name__": "docs"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(shared + code, "docs", "exec"), space)
    return printed.getvalue()


def on_ranks(rank: int, world_size: int, shared: str, codes: list[str]) -> list[str]:
    import deepspeed
    import torch.distributed as dist

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(world_size)
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled on first use
    dist.init_process_group = lambda *_, **__: None  # type: ignore[assignment]  # these ranks have one already
    printed = []
    for code in codes:
        printed.append(run_block(shared, code))
        dist.barrier()
    return printed


SHARED, *BLOCKS = blocks("docs/own_trainer.md", "python")
ALONE = [b for b in BLOCKS if not NEEDS_RANKS.search(b)]
TOGETHER = [b for b in BLOCKS if NEEDS_RANKS.search(b)]


def test_own_trainer_snippets_verify_on_two_ranks_under_every_sharder() -> None:
    printed = run_ranks(on_ranks, 2, SHARED, TOGETHER)[0]
    assert [re.findall(r"verified on 2 ranks \((.*?)\)", text) for text in printed] == [
        [w] for w in WRAPPED
    ]


def one_process(rank: int, world_size: int, shared: str, codes: list[str]) -> list[str]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return [run_block(shared, code) for code in codes]


def test_own_trainer_snippets_run_in_one_process() -> None:
    printed = run_ranks(one_process, 1, SHARED, ALONE)[0]
    text = "\n".join(printed)
    assert len(printed) == 8
    assert text.count("verified on 1 rank (unsharded)") == 5
    assert text.count("x 0.1 (schedule)") == 1
    assert "planned lr 0.0002, live 0.0001" in text
    observed, *ratios = [
        float(line) for line in text.splitlines() if re.fullmatch(r"[\d.e-]+", line)
    ]
    # AdamW moves no weight by more than its rate, and ffn weights are 0.05 and more on average.
    assert len(ratios) == 2 and all(0 < ratio < 2e-3 for ratio in ratios)
    assert observed == pytest.approx(1e-4, rel=0.02)


def test_own_trainer_diff_adds_four_lines_to_a_trainer_that_then_verifies_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (diff,) = blocks("docs/own_trainer.md", "diff")
    marks = [line[:1] for line in diff.splitlines()]
    assert marks.count("+") == 4
    after = "\n".join(line[1:] for line in diff.splitlines() if line[:1] != "-")
    # Ranks are told where they stand in the environment; here is one process.
    code = "import os; [os.environ.pop(k, None) for k in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]\n"
    (printed,) = run_ranks(one_process, 1, code, [after])[0]
    assert printed.count("verified on 1 rank (unsharded)") == 2
    plan = json.loads((tmp_path / "out" / "checkpoint-2" / "plan.json").read_text())
    row = plan["parameters"]["model.layers.0.self_attn.q_proj.weight"]
    assert row["lr"] == 2e-4


STREAMED_SHARED, *STREAMED = blocks("docs/offload.md", "python")


def test_offload_snippets_run_alone_and_under_ddp() -> None:
    training, predicting, ddp = STREAMED
    (trained,) = run_ranks(one_process, 1, STREAMED_SHARED, [training + predicting])[0]
    assert "verified on 1 rank (unsharded)" in trained
    assert [int(n) for n in re.findall(r"fetches=(\d+)", trained)] == [
        9,
        6,
        6,
    ]  # 6 = 2 * (6 blocks - 3 slots)
    assert "streaming 6 of 6 units through 3 slots: " in trained.splitlines()[-1]
    (together,) = run_ranks(on_ranks, 2, STREAMED_SHARED, [ddp])[0]
    assert "verified on 2 ranks (ddp)" in together


def test_offload_page_prints_what_its_predict_commands_print(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = read("docs/offload.md")
    shown = [
        block("docs/offload.md", "bash", "<<'END' > wan_14b.tsv"),
        block("docs/offload.md", "bash", "--tokens 768 --gb-s"),
        block("docs/offload.md", "bash", "--resident 10"),
    ]
    listing = re.search(r"<<'END' > wan_14b.tsv\n(.*?)^END$", shown[0], re.MULTILINE | re.DOTALL)
    assert listing is not None
    (tmp_path / "wan_14b.tsv").write_text(run_block("", listing[1]))
    commands = re.findall(r"^dist-layerlr (predict .*)$", "".join(shown), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        name, file, *flags = command.split()
        path = tmp_path / file if file == "wan_14b.tsv" else ROOT / file
        assert cli.main([name, str(path), *flags]) == 0
        assert f"```text\n{capsys.readouterr().out}```" in text, command


def test_names_page_lists_every_field_strategy_preset_and_convention() -> None:
    text = (DOCS / "names.md").read_text()
    keys = {
        *settings(PerLayerLR, DepthSettings, Region, PatternRule, RfdetrPreset),
        "preset",
        *DEPTH_FUNCTIONS,
        *CONVENTIONS,
    }
    keys |= {*PRESETS, *PRESET_CLASSES}
    assert sorted(k for k in keys if f"`{k}`" not in text) == []


def test_pages_name_files_that_exist() -> None:
    for page in DOCS.glob("*.md"):
        for path in re.findall(
            r"\b(?:launch|ds_configs|docs|tests|benchmarks|dist_layerlr)/[\w/]+(?:\.\w+)+",
            page.read_text(),
        ):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


README = read("README.md")


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What launch/quickstart.sh calls, in a copy of what it reads. Its environment holds stubs and
    is up to date."""
    for path in (
        "launch/quickstart.sh",
        "launch/configs/quickstart.json",
        "requirements",
        "pyproject.toml",
    ):
        subprocess.run(["cp", "-r", "--parents", path, tmp_path], cwd=ROOT, check=True)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    subprocess.run(
        ["cp", "requirements/quickstart.txt", ".venv/lock.txt"], cwd=tmp_path, check=True
    )
    subprocess.run(["cp", "pyproject.toml", ".venv"], cwd=tmp_path, check=True)
    for name in ("pip", "python", "torchrun"):
        (binaries / name).write_text(f'#!/usr/bin/env bash\necho "CALLED {name} $*"\n')
        (binaries / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"], capture_output=True, text=True, check=True
    )
    return [
        line.removeprefix("CALLED ")
        for line in done.stdout.splitlines()
        if line.startswith("CALLED ")
    ]


def test_readmes_first_command_starts_training_with_the_grid_that_readme_shows(
    quickstart: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "bash launch/quickstart.sh " in block("README.md", "bash", "bash tests/run.sh")
    making, training = map(shlex.split, quickstart)
    assert making[:2] == ["python", "launch/make_tiny_wan.py"]
    assert make_tiny_wan.main(making[2:]) == 0
    start = training.index("launch/train.py")
    assert training[:start] == ["torchrun", "--standalone", "--nproc_per_node", "2"]
    capsys.readouterr()
    assert train.main([*training[start + 1 :], "--plan-only"]) == 0
    printed = capsys.readouterr().out
    *grid, verified = block("README.md", "text", "verified on 2 ranks").splitlines()
    assert [line for line in grid if line.strip() != "..." and f"{line}\n" not in printed] == []
    files = ["runs/quickstart/tiny_wan", "--config", "launch/configs/quickstart.json", "--json"]
    assert cli.main(["plan", *files]) == 0
    assert verified.endswith(json.loads(capsys.readouterr().out)["digest"])


def test_readmes_second_command_is_the_one_that_ci_runs() -> None:
    """It runs this test, so nothing else needs to run it."""
    assert "bash tests/run.sh " in block("README.md", "bash", "bash tests/run.sh")
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "bash tests/run.sh"


def test_readmes_python_blocks_run() -> None:
    codes = [
        block("README.md", "python", "plan_model(model, config)"),
        block("README.md", "python", "StreamPolicy"),
    ]
    four_lines, streamed = run_ranks(one_process, 1, "", codes)[0]
    assert four_lines.count("verified on 1 rank (unsharded)") == 1
    assert streamed.count("verified on 1 rank (unsharded)") == 1
    assert "fetches=20" in streamed  # 2 * 12 blocks - 4 slots


def test_readmes_json_is_a_config() -> None:
    config = json.loads(block("README.md", "json", "per_layer_lr"))
    names = ("blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_q.weight", "unknown.weight")
    plan = build_plan([ParamInfo(name=name, shape=(4, 4)) for name in names], config)
    assert [round(plan.entries[name].lr, 12) for name in names] == [1.5e-5, 4.5e-6, 1e-5]


def save_adapter(rank: int, world_size: int, base: str, folder: str) -> None:
    """A checkpoint of LoRA on the tiny Wan, for `dist-layerlr export`."""
    import torch
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    import dist_layerlr

    model = WanTransformer3DModel.from_pretrained(base).requires_grad_(False)
    adapter = LoraConfig(r=2, target_modules=["to_q"])
    model.add_adapter(adapter, "default")
    plan = dist_layerlr.plan_model(
        model, {"learning_rate": 1e-4, "per_layer_lr": {"enabled": True}}
    )
    optimizer = dist_layerlr.attach(plan, model, torch.optim.AdamW)
    extra = {"adapter_config": {**adapter.to_dict(), "target_modules": ["to_q"]}}
    dist_layerlr.save_checkpoint(folder, plan, model, optimizer, step=1, extra=extra)


def test_readmes_dist_layerlr_commands_run(
    tiny_wan: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    run_ranks(save_adapter, 1, str(tiny_wan), str(tmp_path / "saved"))
    # What stands for the capital words of README. A and B are plans of two configs, so they differ.
    wan = str(ROOT / "launch" / "configs" / "wan.json")
    words = {
        "MODEL": str(tiny_wan),
        "...": wan,
        "CHECKPOINT": str(tmp_path / "saved"),
        "OUT": str(tmp_path / "out"),
    }
    for word, config in (("A", "wan"), ("B", "quickstart")):
        assert (
            cli.main(["plan", str(tiny_wan), "--config", f"launch/configs/{config}.json", "--json"])
            == 0
        )
        (tmp_path / word).mkdir()
        (tmp_path / word / "plan.json").write_text(capsys.readouterr().out)
        words[word] = str(tmp_path / word)
    words["lr_grid.png"] = str(tmp_path / "lr_grid.png")
    says = {
        "plan": "model_type=wan",
        "explain": "blocks.2.attn2.to_q.weight",
        "plot": "lr_grid.png",
        "diff": "self_attn",
        "export": "adapter_model.safetensors",
    }
    for line in block("README.md", "bash", "dist-layerlr plan").splitlines():
        program, name, *rest = shlex.split(line, comments=True)
        assert program == "dist-layerlr"
        assert cli.main([name, *(words.get(word, word) for word in rest)]) == (name == "diff"), line
        assert says.pop(name) in capsys.readouterr().out
    assert says == {}


def test_readmes_train_commands_take_their_arguments(
    run_config: dict[str, Any],
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What they start is trained for real in test_world_size_invariance.py and
    test_ds_configs.py."""
    config = str(write_config(run_config))
    lines = block("README.md", "bash", "python launch/train.py --config FILE\n").splitlines()
    assert [line.split()[0] for line in lines] == ["python", "torchrun", "deepspeed"]
    for line in lines:
        words = [config if word == "FILE" else word for word in shlex.split(line, comments=True)]
        arguments = words[words.index("launch/train.py") + 1 :]
        assert train.main([*arguments, "--plan-only"]) == 0, line
        assert "blocks.000-002.self_attn" in capsys.readouterr().out


@needs_families
def test_readmes_way_from_a_pipeline_folder_to_an_adapter_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionXLPipeline
    from PIL import Image

    shutil.copytree(ROOT / "launch" / "configs", tmp_path / "launch" / "configs")
    monkeypatch.chdir(tmp_path)
    assert "`python launch/tiny.py sdxl MODEL`" in README and tiny.main(["sdxl", "MODEL"]) == 0
    Path("photos").mkdir()
    for number, size in enumerate([(64, 64), (96, 64), (64, 64), (96, 64)]):
        Image.new("RGB", size, (40 * number, 99, 200)).save(f"photos/{number}.png")
        Path(f"photos/{number}.txt").write_text("a red square")
    commands = lines(block("README.md", "bash", "launch/cache_latents.py"))
    encode, training, asking = (shlex.split(one, comments=True) for one in commands)
    # Pictures of a million pixels and a thousand steps would take as long as they say.
    assert cache_latents.main([*encode[2:], "--pixels", "4096"]) == 0
    assert training[1] == asking[1] == "launch/train.py"
    assert train.main([*training[2:], "--max-steps", "2"]) == 0
    assert "verified on 1 rank" in capsys.readouterr().out
    assert Path("runs/latest/samples/samples.png").is_file()
    pipeline = StableDiffusionXLPipeline.from_pretrained("MODEL")
    assert '`pipe.load_lora_weights("runs/latest/final")`' in README
    pipeline.load_lora_weights("runs/latest/final")
    assert pipeline.get_active_adapters()
    assert train.main(asking[2:]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(("fits", "too large"))
