"""Tiny pipelines as folders, and ``launch/tiny.py`` that writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from launch import tiny
from launch.trainer.families import FAMILIES, get_family
from launch.trainer.families.diffusion import Diffusion
from launch.trainer.tiny import build, known

pytest.importorskip("diffusers", reason="needs the train extra")


def test_every_diffusion_family_has_a_tiny_pipeline():
    diffusion = {name for name in FAMILIES if isinstance(get_family(name), Diffusion)}
    assert diffusion <= set(known())


PIPELINES = [name for name, module in known().items() if not hasattr(module, "FOLDERS")]
"""The others are folders of one model, which the tests of their families load."""


@pytest.mark.parametrize("name", PIPELINES)
def test_a_written_folder_loads_as_the_pipeline_that_was_built(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from diffusers import DiffusionPipeline

    state = torch.get_rng_state()
    assert tiny.main([name, str(tmp_path / "model")]) == 0
    assert torch.equal(torch.get_rng_state(), state), "the global random state was used"
    said = capsys.readouterr().out
    assert (
        said.startswith(f"wrote {tmp_path / 'model'}: ") and "transformer" in said or "unet" in said
    )
    made = build(name)
    found = DiffusionPipeline.from_pretrained(tmp_path / "model", local_files_only=True)
    assert type(found) is type(made) and (tmp_path / "model" / "model_index.json").is_file()
    for part, module in made.components.items():
        other = found.components[part]
        assert type(other) is type(module), part
        if isinstance(module, nn.Module):
            weights, others = module.state_dict(), other.state_dict()
            assert weights.keys() == others.keys(), part
            assert all(torch.equal(value, others[key]) for key, value in weights.items()), part


def test_a_wrong_family_or_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def refuse(*arguments: str, says: str) -> None:
        assert tiny.main([*arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tiny.py: error: ") and says in line, line

    refuse("sdxxl", str(tmp_path / "a"), says="FAMILY='sdxxl': must be one of chroma_1, ")
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    refuse("sdxl", str(tmp_path / "full"), says="It is not empty; choose")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"
    (tmp_path / "file").write_text("x")
    refuse("sdxl", str(tmp_path / "file"), says="OUT=")
    with pytest.raises(SystemExit) as stop:
        tiny.main(["sdxl"])
    assert stop.value.code == 2 and "OUT" in capsys.readouterr().err
