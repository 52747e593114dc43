"""Names and alphas of exported adapters, against PEFT itself and the census of kohya names."""

from __future__ import annotations

import csv
import gzip
import math
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from dist_layerlr import ConfigError
from dist_layerlr.export.adapter_names import adapter_of, alpha_of, kohya_names, peft_name
from dist_layerlr.plan import canonical_name
from tests.support import census


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.default = nn.Linear(8, 8)  # as an adapter is called
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(8, 3)


def adapted(adapter: str = "default", **settings: Any) -> Any:
    targets = ["words", "default", "conv"]
    return get_peft_model(
        Toy(), LoraConfig(r=4, target_modules=targets, **settings), adapter_name=adapter
    )


@pytest.mark.parametrize("adapter", ["default", "style_norm"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["head"]},
        {"lora_bias": False, "use_rslora": True},
    ],
    ids=str,
)
def test_names_are_those_that_peft_saves(adapter: str, settings: dict[str, Any]) -> None:
    model = adapted(adapter, **settings)
    names = [canonical_name(name) for name, _ in model.named_parameters()]
    ours = {peft_name(name) for name in names if adapter_of(name) == adapter}
    theirs = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    assert ours == theirs.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.{name}" for name in names if adapter_of(name) == adapter
    }


@pytest.mark.parametrize("model", ["sd15", "flux2_klein_4b"])
def test_kohya_names_are_those_of_the_census(model: str) -> None:
    with gzip.open(census.FOLDER / f"{model}.kohya.tsv.gz", "rt") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert len(rows) > 100
    for row in rows:
        assert kohya_names(row["peft_name"])[0] == row["name"]


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"conv": 3, "x.default": 9}}], ids=str
)
def test_kohya_alpha_over_rank_is_pefts_scaling(settings: dict[str, Any]) -> None:
    model = adapted(lora_alpha=6, rank_pattern={"default": 2}, **settings)
    config = model.peft_config["default"].to_dict()
    for path in ("default", "conv"):
        layer = model.get_submodule(f"base_model.model.{path}")
        rank = layer.lora_A["default"].weight.shape[0]
        name = f"{path}.lora_A.default.weight"
        alpha = alpha_of(name, rank, config)
        assert kohya_names(name)[1] == f"lora_unet_{path}.alpha"
        assert math.isclose(alpha / rank, layer.scaling["default"])


def test_what_kohya_has_no_name_for_is_refused() -> None:
    for name in ("a.to_q.lora_magnitude_vector.default.weight", "words.lora_embedding_A.default"):
        with pytest.raises(ConfigError, match=f"Cannot export {name} under a kohya name"):
            kohya_names(name)
