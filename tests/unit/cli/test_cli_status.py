"""What the command line says beside its output, and how it ends after a defect of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_layerlr import LayerLRError, cli, fields
from dist_layerlr.cli import plans
from dist_layerlr.files import read_json
from dist_layerlr.plan.config import Config
from dist_layerlr.plan.training_config import MODEL_TYPES, TRAINER_KEYS
from launch.trainer.cli import complain
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

    monkeypatch.setattr(plans, "read_model", defect)
    assert cli.main(["plan", "x.tsv", "--config", config(tmp_path)]) == 3
    assert "KeyError" in capsys.readouterr().err


def test_an_error_of_several_lines_is_one_line_in_the_library_and_in_the_trainer(
    monkeypatch, capsys
):
    def refuse(_: object) -> None:
        raise LayerLRError("no rule names\n  a.b\n  c.d")

    monkeypatch.setattr(plans, "read_config", refuse)
    assert cli.main(["plan", "x.tsv", "--config", "x.json"]) == 2
    assert capsys.readouterr().err == "dist-layerlr: error: no rule names a.b c.d\n"
    complain("train.py", "no rule names\n  a.b", everywhere=True)
    assert capsys.readouterr().err == "train.py: error: no rule names a.b\n"


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


RUN = {"model_type": "wan", "model_path": "x", "data": {"kind": "digits"}, "train": {"steps": 1}}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"per_layer_lrs": BLOCK}, "'per_layer_lrs' in config. Did you mean 'per_layer_lr'?"),
        ({"optimiser": {}}, "'optimiser' in config. Did you mean 'optimizer'?"),
        ({"model_type": "wna"}, "model_type='wna': must be one of chroma_1"),
        ({"model_type": "flux_2"}, "Did you mean 'flux_2_dev'?"),
        ({**RUN, "logging": {}}, "Unknown key 'logging' in config."),
    ],
)
def test_what_train_py_refuses_as_misspelt_is_refused_here(
    more: dict[str, object], says: str, tmp_path: Path, capsys
):
    file = config(tmp_path, **more)
    assert cli.main(["plan", str(census.FOLDER / "sd15.tsv.gz"), "--config", file]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "more", [{"model_type": "my_unet", "logging": {}}, {"model_type": "toy"}, RUN]
)
def test_other_models_and_other_trainers_keys_are_left_alone(
    more: dict[str, object], tmp_path: Path, capsys
):
    file = config(tmp_path, **more)
    assert cli.main(["plan", str(census.FOLDER / "sd15.tsv.gz"), "--config", file]) == 0


def test_the_keys_and_families_known_here_are_those_of_the_trainer():
    from launch.trainer.options import BLOCKS, RunOptions

    trainers = {*fields.settings(RunOptions), *BLOCKS} - fields.settings(Config).keys()
    assert trainers == set(TRAINER_KEYS)
    shipped = (Path(__file__).resolve().parents[3] / "launch" / "configs").glob("*.json")
    assert {read_json(file)["model_type"] for file in shipped} == set(MODEL_TYPES)
