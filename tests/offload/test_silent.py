"""Results that were wrong without a word: each is right now, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Immediate
from dist_layerlr.offload.streaming import stream_on
from tests.support.training import Case, attach, loss_of

LORA, FULL = Case(lora=True), Case(lora=False)


def test_weights_that_share_memory_and_train_are_refused():
    model: Any = FULL.model()
    model.blocks[3].attn.to_k.weight.data = model.blocks[1].attn.to_k.weight.data
    with pytest.raises(OffloadError) as error:
        attach(model, FULL, "cpu")
    for part in ("blocks.1.attn.to_k.weight", "blocks.3.attn.to_k.weight", "share memory"):
        assert part in str(error.value)


def test_frozen_weights_that_share_memory_are_streamed():
    model: Any = LORA.model()
    for layer in (model.blocks[1].attn.to_k, model.blocks[3].attn.to_k):
        layer.weight.data = model.blocks[2].attn.to_k.weight.data
    with attach(model, LORA, "cpu"):
        loss_of(model, LORA, 0, "cpu").backward()


def test_the_default_device_does_not_move_the_masters():
    model = FULL.model()
    with torch.device("meta"):
        handle = stream_on(Immediate(torch.device("cpu")), model, FULL.policy())
    with handle:
        assert all(p.device.type == "cpu" for p in model.parameters())
        loss_of(model, FULL, 0, "cpu").backward()
