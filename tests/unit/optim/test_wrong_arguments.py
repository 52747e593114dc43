"""Arguments of one's own trainer that are of another kind: one line says what belongs there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_layerlr as dl
from dist_layerlr.errors import ConfigError
from dist_layerlr.integrations import LayerLRLightning
from dist_layerlr.ranks import is_shared
from tests.support.ranks import run_ranks

CONFIG = {"learning_rate": 1e-3, "per_layer_lr": {"enabled": True}}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("kind", "linar", "one of constant, linear, cosine"),
        ("warmup_steps", -1, "an integer >= 0"),
        ("total_steps", 0, "an integer >= 1"),
        ("min_ratio", 2.0, "in [0, 1]"),
    ],
)
def test_a_schedule_made_by_hand_is_checked_as_a_configs_is(field: str, value: Any, allowed: str):
    with pytest.raises(ConfigError) as found:
        dl.Schedule(**{"total_steps": 10, field: value})
    assert f"Invalid {field}={value!r}: must be " in str(found.value)
    assert allowed in str(found.value)


@pytest.mark.parametrize("emission", ["groups", "segmented"])
def test_what_builds_no_optimizer_is_refused(emission: str):
    model = nn.Linear(2, 2)
    plan = dl.plan_model(model, CONFIG)
    built = torch.optim.SGD(model.parameters(), lr=1e-3)
    for make, says in (
        (built, "Invalid make: a SGD. Give what builds the optimizer"),
        (lambda _: None, "Invalid make: it returned a NoneType. Return the optimizer"),
    ):
        with pytest.raises(ConfigError, match=says):
            dl.attach(plan, model, make, emission=emission)  # type: ignore[arg-type]


def test_a_config_in_place_of_the_model_is_told():
    with pytest.raises(ConfigError, match="Invalid model: a dict. Give the nn.Module"):
        dl.plan_model(CONFIG, nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_checkpoint_of_lightning_from_before_a_fit_holds_no_plan():
    rates = LayerLRLightning(CONFIG)
    rates.load_state_dict(LayerLRLightning(CONFIG).state_dict())
    assert rates._resumed is None  # on_train_start then refuses to resume from it


def _initialize(rank: int, _: int, file: str) -> tuple[str, bool]:
    model = nn.Linear(2, 2)
    plan = dl.plan_model(model, CONFIG)
    try:
        # One node has the file, the other one has not.
        config: Any = {"gradient_clipping": 0.0} if rank == 0 else file
        dl.initialize_deepspeed(plan, model, torch.optim.SGD, config)
    except ConfigError as error:
        return str(error), is_shared(error)
    raise AssertionError("started without its config")


def test_a_ds_config_that_one_rank_cannot_read_ends_all(tmp_path: Path):
    said = run_ranks(_initialize, 2, str(tmp_path / "ds.json"))
    assert said[0] == said[1]
    assert "ds.json': No such file" in said[0][0] and said[0][1]
