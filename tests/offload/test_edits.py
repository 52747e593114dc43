"""Edits of frozen weights between passes that no version counter sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.families import BLOCKS, toy_batch
from tests.support.toys import WIDTH, Block
from tests.support.training import Case, attach, loss_of

LORA = Case(lora=True)


def _edit(weight: torch.Tensor, kind: str) -> None:
    """Write to a row or column without any version counter."""
    if kind == "numpy row":
        weight.detach().numpy()[7] += 1.0
    elif kind == "swapped rows":
        weight.data[[3, 7]] = weight.data[[7, 3]]
    else:
        weight.data[:, 7] += 1.0


@pytest.mark.parametrize(
    "kind, transposed, hidden",
    [
        *(
            (kind, t, 2000)
            for kind in ("numpy row", "swapped rows", "column")
            for t in (False, True)
        ),
        ("swapped rows", False, 40),  # a unit so small that all of it is read
    ],
)
def test_an_edit_of_one_row_or_column_of_a_frozen_weight_is_seen(
    kind: str, transposed: bool, hidden: int
):
    values = torch.randn(WIDTH, hidden).t() if transposed else torch.randn(hidden, WIDTH)

    def script(model: Any) -> list[torch.Tensor]:
        found = []
        for i in range(BLOCKS):  # whichever is kept in the ring
            weight = model.blocks[i].mlp[0].base_layer.weight
            with torch.no_grad():
                found.append(model.blocks[i](torch.ones(2, WIDTH)))
                _edit(weight, kind)
                found.append(model(**toy_batch(0)))
            _edit(weight, kind)
            loss = loss_of(model, LORA, 0, "cpu")
            _edit(weight, kind)
            loss.backward()
            found.append(model.blocks[0].attn.to_q.lora_A.default.weight.grad.clone())
            _edit(weight, kind)
            found.append(model(**toy_batch(0)))
        return found

    models: list[Any] = [LORA.model(block=lambda: Block(WIDTH, hidden)) for _ in range(2)]
    for model in models:
        for one in model.blocks:
            one.mlp[0].base_layer.weight.data = values.clone(memory_format=torch.preserve_format)
    wanted = script(models[0])
    with attach(models[1], LORA, "cpu"):
        found = script(models[1])
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("grad", [True, False])
def test_an_edit_between_two_calls_of_one_block_is_seen(grad: bool):
    def script(model: Any) -> list[torch.Tensor]:
        found, layer = [], model.blocks[1].mlp[0]
        for call in (model.blocks[1], layer):
            for kind in ("numpy row", "swapped rows", "column"):
                found.append(call(torch.ones(2, WIDTH)).detach())
                _edit(layer.base_layer.weight, kind)
        return [*found, layer(torch.ones(2, WIDTH)).detach()]

    models: list[Any] = [LORA.model(block=lambda: Block(WIDTH, 2000)) for _ in range(2)]
    with torch.set_grad_enabled(grad), attach(models[1], LORA, "cpu"):
        assert all(map(torch.equal, script(models[1]), script(models[0])))
