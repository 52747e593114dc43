"""The documentation's code runs: Python blocks as they stand, JSON fields as the reader takes
them."""

from __future__ import annotations

import contextlib
import io
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr import cli
from dist_layerlr.fields import settings
from dist_layerlr.offload import StreamPolicy
from dist_layerlr.plan.config import PatternRule, PerLayerLR, Region
from dist_layerlr.plan.depth import DEPTH_FUNCTIONS, DepthSettings
from dist_layerlr.plan.layer_decay import CONVENTIONS
from dist_layerlr.plan.presets import PRESET_CLASSES, PRESETS, RfdetrPreset
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
NEEDS_RANKS = re.compile(r"init_process_group|Accelerator\(")
WRAPPED = ["ddp", "fsdp2", "fsdp1", "fsdp1 flat", "zero 2", "zero 3", "ddp"]
"""What the blocks of own_trainer.md that need ranks say they verified, in order."""


def python_blocks(page: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )


def run_block(shared: str, block: str) -> str:
    """Run a block after the shared part. Returns what it printed."""
    space: dict[str, Any] = {"__name__": "docs"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(shared + block, "docs", "exec"), space)
    return printed.getvalue()


def on_ranks(rank: int, world_size: int, shared: str, blocks: list[str]) -> list[str]:
    import deepspeed
    import torch.distributed as dist

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(world_size)
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled on first use
    dist.init_process_group = lambda *_, **__: None  # type: ignore[assignment]  # these ranks have one already
    printed = []
    for block in blocks:
        printed.append(run_block(shared, block))
        dist.barrier()
    return printed


SHARED, *BLOCKS = python_blocks("own_trainer.md")
ALONE = [b for b in BLOCKS if not NEEDS_RANKS.search(b)]
TOGETHER = [b for b in BLOCKS if NEEDS_RANKS.search(b)]


def test_own_trainer_snippets_verify_on_two_ranks_under_every_sharder() -> None:
    printed = run_ranks(on_ranks, 2, SHARED, TOGETHER)[0]
    assert [re.findall(r"verified on 2 ranks \((.*?)\)", text) for text in printed] == [
        [w] for w in WRAPPED
    ]


def one_process(rank: int, world_size: int, shared: str, blocks: list[str]) -> list[str]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return [run_block(shared, block) for block in blocks]


def test_own_trainer_snippets_run_in_one_process() -> None:
    printed = run_ranks(one_process, 1, SHARED, ALONE)[0]
    text = "\n".join(printed)
    assert len(printed) == 6
    assert text.count("verified on 1 rank (unsharded)") == 3
    assert "planned lr 0.0002, live 0.0001" in text
    observed = [float(line) for line in text.splitlines() if re.fullmatch(r"[\d.e-]+", line)]
    assert observed == [pytest.approx(1e-4, rel=0.02)]


STREAMED_SHARED, *STREAMED = python_blocks("offload.md")


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
    text = (DOCS / "offload.md").read_text()
    listing = re.search(r"<<'END' > wan_14b.tsv\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
    assert listing is not None
    (tmp_path / "wan_14b.tsv").write_text(run_block("", listing[1]))
    commands = re.findall(r"^dist-layerlr (predict .*)$", text, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        name, file, *flags = command.split()
        path = tmp_path / file if file == "wan_14b.tsv" else ROOT / file
        assert cli.main([name, str(path), *flags]) == 0
        assert f"```text\n{capsys.readouterr().out}```" in text, command


def test_offload_page_lists_every_field_of_the_policy() -> None:
    text = (DOCS / "offload.md").read_text()
    assert [f.name for f in fields(StreamPolicy) if f"| `{f.name}` |" not in text] == []


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
