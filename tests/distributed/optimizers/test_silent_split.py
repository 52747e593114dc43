"""Ways in which others split names into matrices and the rest, and lose the split: each is shown on
naive code first, then with ours. When a naive test no longer passes, upstream has mended it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

import dist_layerlr
from dist_layerlr.errors import PlanMismatch
from dist_layerlr.optim import attach, bind
from tests.support.cases import At, Cases, Outcomes
from tests.support.drivers import start_deepspeed
from tests.support.naive_deepspeed import ds_config, masters, silence, start
from tests.support.several import (
    BATCH,
    LORA,
    MAKES,
    NET,
    WRAPS,
    Run,
    adamw,
    lora_net,
    muon,
    net,
    reference_of,
)

cases = Cases(before=start_deepspeed)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    yield cases.run(request)


def matrices(model: nn.Module) -> list[str]:
    """What thirteen public projects call matrices."""
    return [n for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2]


def settings(**zero: Any) -> dict[str, Any]:
    return {**ds_config(3, zero), "train_micro_batch_size_per_gpu": BATCH // 2}


# --- after FSDP1, no parameter has two dimensions ---


@cases
def test_naive_ndim_finds_no_matrix_under_fsdp1(at: At) -> None:
    for layout in ("fsdp1", "fsdp1_flat"):
        assert matrices(WRAPS[layout](net(), NET)) == []
    assert len(matrices(net())) == 26


@cases
def test_verify_names_matrices_that_adamw_steps_under_flat_fsdp1(at: At) -> None:
    model = net()
    plan = dist_layerlr.plan_model(model, NET.config)
    sharded = WRAPS["fsdp1_flat"](model, NET)
    with pytest.raises(PlanMismatch, match=r"planned for muon, stepped by AdamW") as caught:
        dist_layerlr.verify(plan, sharded, adamw([{"params": list(sharded.parameters())}]))
    assert "ndim == 2 is false of" in str(caught.value)


# --- under zero.Init, neither ---


@cases
def test_naive_ndim_finds_no_matrix_under_zero_init(at: At) -> None:
    with silence(), deepspeed.zero.Init(config_dict_or_path=settings()):
        model = net()
    assert matrices(model) == []
    assert {p.ndim for p in model.parameters()} == {1}


@cases
def test_ours_splits_by_true_shapes_under_zero_init(at: At) -> None:
    with silence():
        with deepspeed.zero.Init(config_dict_or_path=settings()):
            model = net()
        plan = dist_layerlr.plan_model(model, NET.config)
        optimizer = attach(plan, model, MAKES, emission="segmented")
        engine = start(model, optimizer, settings())
        bind(plan, engine)
        taken = [n for n, e in plan.entries.items() if e.optimizer == "muon"]
        assert taken == [n for n in matrices(net()) if n not in ("emb.weight", "head.weight")]
        proof = dist_layerlr.verify(plan, engine)
        assert proof.optimizers == {"AdamW": 53, "Muon": 24}


@cases
def test_verify_names_matrices_that_adamw_steps_under_zero_3(at: At) -> None:
    model = net()
    plan = dist_layerlr.plan_model(model, NET.config)
    with silence(), pytest.raises(PlanMismatch, match="planned for muon, stepped by AdamW"):
        naive = adamw([{"params": list(model.parameters()), "lr": 1e-3}])
        dist_layerlr.verify(plan, start(model, naive, settings()))


# --- DeepSpeed's Muon splits by itself, and discards the groups' own split ---


def tagged(model: nn.Module) -> list[str]:
    """What DeepSpeed's Muon takes: it asks no group, and tags parameters by shape and two words."""
    config = SimpleNamespace(optimizer_name="muon", optimizer_params={"lr": 1e-3})
    deepspeed.set_optimizer_flags(config, model)
    named: list[tuple[str, Any]] = list(model.named_parameters())
    return [n for n, p in named if p.requires_grad and p.use_muon]


@cases
def test_naive_deepspeed_muon_takes_embedding_head_and_adapters(at: At) -> None:
    # "emb" is no "embed" and "head" no "lm_head": its list of words does not know them.
    assert {"emb.weight", "head.weight"} <= set(tagged(net()))
    assert any("lora_A" in name for name in tagged(lora_net()))


@cases
def test_verify_names_what_deepspeeds_muon_takes_too_much(at: At) -> None:
    """Its groups say by a flag which of its two algorithms steps them."""
    model = net()
    plan = dist_layerlr.plan_model(model, NET.config)
    taken = tagged(model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[n] for n in taken], "use_muon": True},
        {"params": [p for n, p in named.items() if n not in taken], "use_muon": False},
    ]
    with pytest.raises(PlanMismatch) as caught:
        dist_layerlr.verify(plan, model, adamw(groups))
    assert "emb.weight: planned for adamw, stepped by Muon" in str(caught.value)


# --- embeddings, heads and adapters are matrices, too ---


@cases
def test_naive_ndim_gives_embeddings_heads_and_adapters_to_muon(at: At) -> None:
    assert {"emb.weight", "head.weight"} <= set(matrices(net()))
    assert any("lora_" in name for name in matrices(lora_net()))


@cases
def test_ours_leaves_them_to_the_rest_and_says_why(at: At) -> None:
    plan = dist_layerlr.plan_model(lora_net(), LORA.config)
    pair = [e for n, e in plan.entries.items() if "lora_" in n]
    assert len(pair) == 12
    assert {(e.optimizer, e.optimizer_why) for e in pair} == {
        ("adamw", "not muon: a factor of an adapter (lora is false)")
    }
    entries = dist_layerlr.plan_model(net(), NET.config).entries
    for name in ("emb.weight", "head.weight"):
        assert entries[name].optimizer == "adamw"
        assert "which no other lists" in entries[name].optimizer_why


@cases
def test_naive_muon_on_everything_ends_elsewhere(at: At) -> None:
    """The loss is silent, and it is not small: whole rates away."""
    model = net()
    names = matrices(model)
    named = dict(model.named_parameters())
    optimizers = [
        muon([{"params": [named[n] for n in names], "lr": 3e-3}]),
        adamw([{"params": [p for n, p in named.items() if n not in names], "lr": 1e-3}]),
    ]
    for step in range(10):
        NET.loss(model, step, slice(None)).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    wanted = reference_of(NET)["head.weight"]
    assert float((model.get_parameter("head.weight") - wanted).abs().max()) > 1e-3


@cases
def test_ours_under_zero_3_ends_where_the_reference_ends(at: At) -> None:
    with silence():
        run = Run(NET, "zero 3")
        run.train()
        found = masters(run.model)
    assert torch.equal(found["head.weight"], reference_of(NET)["head.weight"])
