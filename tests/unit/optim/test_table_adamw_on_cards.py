"""What TableAdamW does for cards, as far as it shows without one: graphs, waits, compiled code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import dist_layerlr as dl
from dist_layerlr.optim import TableAdamW, table_adamw, tables
from tests.support.table_adamw import (
    assert_close,
    give_gradients,
    groups,
    table_kernel,
    tensors,
    train,
)

ROOT = Path(__file__).resolve().parents[3]
COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from dist_layerlr.optim import table_kernel as kernel
assert kernel.IS_COMPILED
P, M = tl.bfloat16, tl.float32
constant = {"P": P, "G": P, "M": M, "V": M, "WORK": tl.float32}
constant |= {"BLOCK": kernel.BLOCK, "ALIGNED": True, "BY_HAND": False}
types = {"addresses": "*i64", "chunks": "*i32", "rates": "*fp32", "segments": "i32"}
types |= dict.fromkeys(constant, "constexpr")
source = triton.compiler.ASTSource(fn=kernel.adamw, signature=types, constexprs=constant)
options = {"num_warps": kernel.WARPS}
print(triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"])
"""


class NoWaiting(TorchDispatchMode):
    """Refuses to hand a number to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        return func(*args, **(kwargs or {}))


def without_waiting(monkeypatch: pytest.MonkeyPatch, optimizer: TableAdamW) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patched:
        # The interpreter reads numbers as it likes; the launch is no part of this.
        patched.setattr(table_kernel, "adamw", {(n,): lambda *_, **__: None for n in range(99)})
        patched.setattr(Tensor, "tolist", refuse)
        patched.setattr(Tensor, "numpy", refuse)
        with NoWaiting():
            optimizer.step()


def test_a_capturable_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = TableAdamW(groups(tensors()), capturable=True)
    train(optimizer, range(2))
    give_gradients([p for g in optimizer.param_groups for p in g["params"]], 2)
    optimizer.param_groups[0]["lr"] = 0.5
    without_waiting(monkeypatch, optimizer)
    assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 3


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Pretends that a CUDA graph is being captured."""

    def begin(on: bool) -> None:
        for module in (tables, table_adamw):
            monkeypatch.setattr(module, "is_capturing", lambda: on)

    return begin


def test_a_captured_step_takes_new_gradients_and_write_rates_changes_what_it_reads(
    capturing: Callable[[bool], None],
) -> None:
    params = tensors()
    optimizer = TableAdamW(groups(params), capturable=True)
    train(optimizer, range(2))
    (table,) = optimizer._tables.values()
    rates = table.write_settings([table_adamw._settings(g) for g in optimizer.param_groups])
    capturing(True)
    train(optimizer, range(2, 3))
    capturing(False)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.write_rates()
    assert float(rates[0, 0]) == 0.5  # in place: a graph reads that memory
    reference = AdamW(groups(tensors()))
    train(reference, range(3))
    reference.param_groups[0]["lr"] = 0.5
    assert_close(train(optimizer, range(3, 5)), train(reference, range(3, 5)))


def test_an_ordinary_step_after_a_capture_writes_its_own_addresses_again(
    capturing: Callable[[bool], None],
) -> None:
    params = tensors()
    optimizer = TableAdamW(groups(params), capturable=True)
    train(optimizer, range(1))
    capturing(True)
    optimizer.step()
    with pytest.raises(dl.ConfigError, match="no ordinary step since the last capture"):
        optimizer.step()
    capturing(False)
    optimizer.step()
    (table,) = optimizer._tables.values()
    assert table._addresses is not None
    # What a replay of the graph does: it writes the addresses of gradients of its own.
    table._addresses[1][1].copy_(table._addresses[1][0].clone())
    optimizer.step()
    assert int(table._addresses[1][1][0]) == params[0].grad.data_ptr()  # type: ignore[union-attr]


def test_what_a_graph_could_not_follow_is_refused_in_its_capture(
    capturing: Callable[[bool], None],
) -> None:
    params = tensors()
    fixed = TableAdamW(groups(params))
    optimizer = TableAdamW(groups(params), capturable=True)
    train(optimizer, range(1))
    capturing(True)
    with pytest.raises(dl.ConfigError, match="capturable=False in the capture"):
        fixed.step()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(dl.ConfigError, match="learning rates .* changed.*write_rates"):
        optimizer.step()
    params[0].grad = None
    with pytest.raises(dl.ConfigError, match="which tensors have gradients.*ordinary step"):
        optimizer.step()


def test_the_kernel_compiles_for_a_card_and_reads_16_bytes_at_once(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = tmp_path / "compile_it.py"
    script.write_text(COMPILE)
    ran = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "ld.global.v4.b32" in ran.stdout and "st.global.v4.b32" in ran.stdout
