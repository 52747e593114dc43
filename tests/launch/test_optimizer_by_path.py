"""``optimizer.type`` as an import path: any torch optimizer trains as on one process, or is refused
before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_layerlr.errors import ConfigError
from dist_layerlr.plan import load_config
from launch.trainer.optimizers import (
    OptimizerOptions,
    make_optimizers,
    read_optimizer,
    state_bytes,
)
from tests.support.jobs import ROOT, call_of, run_in_ranks, weights

SHARDERS = {
    **{name: ["--sharding", name] for name in ("ddp", "fsdp1_flat", "fsdp2")},
    "zero2": ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")],
}
SLICED = [name for name in SHARDERS if name != "ddp"]
EXACT = {
    "lion": ("lion_pytorch.Lion", {"betas": [0.9, 0.99]}),
    "nadam": ("torch.optim.NAdam", {}),
}
"""Elementwise: right on slices of any form."""
FACTORED = ("transformers.optimization.Adafactor", {"relative_step": False})
"""Divides by means over rows and columns, which a slice does not hold."""


def with_optimizer(run_config: dict[str, Any], path: str, args: dict[str, Any]) -> dict[str, Any]:
    return {
        **run_config,
        "optimizer": {"type": path, "args": args, "weight_decay": 0.01},
        "train": {"steps": 3, "global_batch": 4},
    }


def test_what_is_exact_trains_alike_under_every_sharder_and_the_rest_is_refused_before(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    configs = {name: with_optimizer(run_config, *EXACT[name]) for name in EXACT}
    configs["factored"] = with_optimizer(run_config, *FACTORED)
    alone = [call_of(config, tmp_path / name) for name, config in configs.items()]
    for ended in run_in_ranks(1, alone):
        assert ended.status == 0, ended.complaint
        assert "[per_layer_lr] verified on" in ended.said
    pairs = [(name, sharder) for name in configs for sharder in SHARDERS]
    calls = [
        call_of(configs[name], tmp_path / f"{name}-{sharder}", *SHARDERS[sharder])
        for name, sharder in pairs
    ]
    for (name, sharder), ended in zip(pairs, run_in_ranks(2, calls), strict=True):
        if name == "factored" and sharder in SLICED:
            assert ended.status == 2 and "Adafactor" in ended.complaint, sharder
            assert not (tmp_path / f"{name}-{sharder}" / "out" / "metrics.jsonl").exists()
            continue
        assert ended.status == 0, f"{name}, {sharder}: {ended.complaint}"
        shared, single = (weights(tmp_path / f) for f in (f"{name}-{sharder}", name))
        turned = max(
            float(((single[key] - shared[key]).abs() > 1e-5).float().mean()) for key in single
        )
        # Lion moves by a sign, which rounding may turn where a mean of gradients is next to 0.
        assert turned <= (0.01 if name == "lion" else 0), f"{name}, {sharder}: {turned:.1%}"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"kind": "lion"}, "optimizer.type='lion': must be adamw, sgd, or an optimizer's import"),
        ({"kind": "no_such.Lion"}, "Importing it failed: No module named 'no_such'"),
        ({"kind": "torch.nn.Linear"}, "torch.nn has no torch optimizer of the name 'Linear'"),
        ({"kind": "torch.optim.Adam", "args": {"beta": 1}}, "unexpected keyword argument 'beta'"),
        ({"kind": "torch.optim.LBFGS"}, "cannot be made and stepped on a matrix"),
        ({"kind": "torch.optim.Adam", "eps": 1e-6}, "optimizer.eps.*put it into optimizer.args"),
        ({"args": {"eps": 1e-6}}, "optimizer.args.*put it into the fields beside it"),
        (
            {"kind": "torch.optim.Adam", "args": {"lr": 0.1}},
            "args.lr=0.1: every group has the plan",
        ),
        ({"kind": "torch.optim.Rprop", "weight_decay": 0.3}, "which takes none: remove it"),
        (
            {"kind": "torch.optim.Adam", "weight_decay": 0.2, "args": {"weight_decay": 0.1}},
            "two values for one setting",
        ),
        ({"kind": "schedulefree.AdamWScheduleFree"}, "changes the weights whenever training"),
    ],
    ids=str,
)
def test_what_cannot_train_is_refused_in_one_line(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_optimizer(given)


def test_an_optimizer_of_matrices_alone_is_refused_where_vectors_train_too() -> None:
    options = read_optimizer({"kind": "torch.optim.Muon"})
    make = make_optimizers(options, load_config({"learning_rate": 1e-3}))
    assert callable(make)
    with pytest.raises(ConfigError, match="Muon only supports 2D.*belongs into the 'optimizers'"):
        make([{"params": [torch.nn.Parameter(torch.ones(3))], "lr": 1e-3}])


@pytest.mark.parametrize(
    ("options", "per_element"),
    [
        (OptimizerOptions(), 8.0),
        (OptimizerOptions(kind="sgd"), 4.0),
        (OptimizerOptions(kind="sgd", momentum=0.0), 0.0),
        (OptimizerOptions(kind="lion_pytorch.Lion"), 4.0),
        (OptimizerOptions(kind="torch.optim.Adam", args={"amsgrad": True}), 12.0),
        # A row and a column of 64 for a matrix of 64 x 64.
        (OptimizerOptions(kind=FACTORED[0], args=FACTORED[1]), 4 * 2 * 64 / 64**2),
    ],
    ids=str,
)
def test_the_size_of_its_state_is_measured(options: OptimizerOptions, per_element: float) -> None:
    assert state_bytes(options) == per_element
