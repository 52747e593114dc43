"""What the command line says beside its output, and how it ends after a defect of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_layerlr import cli
from tests.support import census

BLOCK = {"enabled": True, "component_lr": {"self_attn": 1e-4}}


def config(folder: Path, **more: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"per_layer_lr": BLOCK, **more}))
    return str(path)


def test_a_defect_ends_with_status_3_which_is_not_diffs_they_differ(
    tmp_path: Path, monkeypatch, capsys
):
    def defect(_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(cli, "read_model", defect)
    assert cli.main(["plan", "x.tsv", "--config", config(tmp_path)]) == 3
    assert "KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "said"), [("sd15.lora", False), ("sd15", True)], ids=["adapter", "full"]
)
def test_a_full_model_under_a_lora_config_is_said(model: str, said: bool, tmp_path: Path, capsys):
    file = config(tmp_path, adapter={"type": "lora", "rank": 4})
    names = str(census.FOLDER / f"{model}.tsv.gz")
    assert cli.main(["plan", names, "--config", file]) == 0
    assert ("trains a LoRA" in capsys.readouterr().err) is said


def test_a_misspelt_block_is_refused(tmp_path: Path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"per_layer_lrs": BLOCK}))
    assert cli.main(["plan", str(census.FOLDER / "sd15.tsv.gz"), "--config", str(path)]) == 2
    assert "Did you mean 'per_layer_lr'?" in capsys.readouterr().err
