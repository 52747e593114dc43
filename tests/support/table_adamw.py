"""What the tests of TableAdamW share. Importing it skips them where triton is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton")
with pytest.MonkeyPatch.context() as patch:
    # What runs the kernel is decided when its module is imported, which nothing else here does.
    patch.setenv("TRITON_INTERPRET", "1")
    from dist_layerlr.optim import table_kernel as table_kernel
if table_kernel.IS_COMPILED:
    pytest.skip("the kernel was compiled for a card in this process", allow_module_level=True)

SHAPES = [(3,), (5000,), (17, 33), (0,), (), (64, 128), (8193,)]


def tensors(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """A rate and a decay for each tensor."""
    return [
        {"params": [p], "lr": 1e-3 * (number + 1), "weight_decay": 0.05 * number}
        for number, p in enumerate(params)
    ]


def give_gradients(params: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, steps: Sequence[int] = range(10)) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        give_gradients(params, step)
        optimizer.step()
    return [p.detach() for p in params]


def assert_close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Within 1e-6 of the largest weight."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
