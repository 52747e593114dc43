"""What streaming costs the host: microseconds of Python per block and step, beside no streaming.

    python benchmarks/streaming_overhead.py    # 1 minute on 2 cores
    python benchmarks/streaming_overhead.py --rounds 60 --output overhead.json

Blocks of 16 weights so small that nothing but the host's own work takes time, on the CPU, where
copies are immediate. Each of four models is stepped (forward and backward) in turn with its twin
that is not streamed; what is printed are medians over all rounds: the CPU time of the thread that
trains, which a loaded machine leaves alone, and that of the whole process, its workers included.

The second table is the way of a gradient to the host: bytes per second of a backward pass through
one block of large weights, beside a plain copy of the same bytes into a buffer that is kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_layerlr.offload import StreamPolicy, stream

BLOCKS, WEIGHTS, WIDTH = 40, 16, 8
GRADIENT_WIDTH, GRADIENT_WEIGHTS = 2048, 4
"""Four weights of 16.8 MB in float32: more than the caches hold."""


class Block(nn.Module):
    """Sixteen small matrices in a row; with ``lora``, frozen, and an adapter around them."""

    def __init__(self, lora: bool):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(WEIGHTS))
        self.down = self.up = None
        if lora:
            self.requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, WIDTH) -> (B, WIDTH)."""
        start = x
        for layer in self.layers:
            x = layer(x)
        return x if self.down is None or self.up is None else x + self.up(self.down(start))


class Model(nn.Module):
    """A stack of blocks."""

    def __init__(self, *, lora: bool, checkpointed: bool):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(lora) for _ in range(BLOCKS))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(B, WIDTH) -> (B, WIDTH)."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: medians in microseconds per block and step."""

    case: str
    unhooked_us: float
    streamed_us: float
    extra_us: float
    """Of the training thread."""
    extra_forward_us: float
    extra_process_us: float
    """Of all threads."""


class _Stepped:
    """One model and the times of its steps."""

    def __init__(self, *, lora: bool, checkpointed: bool, streamed: bool):
        self._model = Model(lora=lora, checkpointed=checkpointed)
        self._x = torch.randn(2, WIDTH).requires_grad_()
        # The adapters are smaller than the matrices, and stay.
        policy = StreamPolicy(prefetch_window=1, min_numel=WIDTH * WIDTH)
        self._handle = stream(self._model, policy, device="cpu") if streamed else None
        self.forward: list[float] = []
        self.whole: list[float] = []
        self.process: list[float] = []

    def step(self) -> None:
        """Forward and backward, timed."""
        start, everything = time.thread_time(), time.process_time()
        loss = self._model(self._x).sum()
        middle = time.thread_time()
        loss.backward()
        end = time.thread_time()
        self.process.append(time.process_time() - everything)
        self.forward.append(middle - start)
        self.whole.append(end - start)
        self._model.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Drop the times so far."""
        for times in (self.forward, self.whole, self.process):
            times.clear()

    def stop(self) -> None:
        """Stop streaming."""
        if self._handle is not None:
            self._handle.remove()


def _per_block(seconds: list[float]) -> float:
    return statistics.median(seconds) / BLOCKS * 1e6


def overhead(case: str, rounds: int, *, lora: bool, checkpointed: bool) -> Row:
    """Step a streamed model and its twin in turn."""
    twins = [_Stepped(lora=lora, checkpointed=checkpointed, streamed=s) for s in (False, True)]
    for i in range(rounds + 3):
        for twin in twins:
            if i == 3:
                twin.forget()
            twin.step()
    plain, streamed = twins
    row = Row(
        case=case,
        unhooked_us=_per_block(plain.whole),
        streamed_us=_per_block(streamed.whole),
        extra_us=_per_block(streamed.whole) - _per_block(plain.whole),
        extra_forward_us=_per_block(streamed.forward) - _per_block(plain.forward),
        extra_process_us=_per_block(streamed.process) - _per_block(plain.process),
    )
    streamed.stop()
    return row


class _Large(nn.Module):
    """One block whose backward does nothing but hand out gradients that are ready."""

    def __init__(self) -> None:
        super().__init__()
        shape = GRADIENT_WIDTH, GRADIENT_WIDTH
        self.weights = nn.ParameterList(torch.zeros(shape) for _ in range(GRADIENT_WEIGHTS))

    def forward(self, gradients: list[Tensor]) -> Tensor:
        """A scalar whose gradients with respect to the weights are ``gradients``."""
        out = _Ready.apply(gradients, *self.weights)  # type: ignore[no-untyped-call]
        assert isinstance(out, Tensor)
        return out


class _Ready(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        """Zero."""
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """What was given."""
        # New tensors over the same memory, which autograd takes as they are.
        return None, *(g.view_as(g) for g in ctx.gradients)


def _fastest(work: Callable[[], object], times: list[float]) -> None:
    start = time.perf_counter()
    work()
    times.append(time.perf_counter() - start)


def gradient_path(rounds: int) -> dict[str, float]:
    """GB/s of gradients on their way to the host, and of a plain copy of as many bytes."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([_Large(), _Large()])})
    handle = stream(model, StreamPolicy(min_numel=1), device="cpu")
    block: Any = model["blocks"][0]  # type: ignore[index]
    size = GRADIENT_WIDTH, GRADIENT_WIDTH
    made = [torch.randn(size) for _ in range(GRADIENT_WEIGHTS)]
    kept = [torch.zeros(size) for _ in range(GRADIENT_WEIGHTS)]
    plain: list[float] = []
    path: list[float] = []

    def copy() -> None:
        for target, source in zip(kept, made, strict=True):
            target.copy_(source)

    for _ in range(rounds):
        _fastest(copy, plain)
        loss = block(made)
        _fastest(loss.backward, path)
        model.zero_grad(set_to_none=True)
    handle.remove()
    nbytes = sum(t.nbytes for t in made)
    found = {
        "plain_gb_s": nbytes / statistics.median(plain) / 1e9,
        "path_gb_s": nbytes / statistics.median(path) / 1e9,
    }
    return {**found, "share": found["path_gb_s"] / found["plain_gb_s"]}


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="measured steps (default: 30)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    rows = []
    print(f"{'us per block and step':<22}{'unhooked':>10}{'streamed':>10}{'extra':>8}", end="")
    print(f"{'forward':>9}{'all threads':>13}")
    for lora in (True, False):
        for checkpointed in (False, True):
            case = f"{'lora' if lora else 'full'} {'checkpoint' if checkpointed else 'plain'}"
            row = overhead(case, args.rounds, lora=lora, checkpointed=checkpointed)
            rows.append(row)
            print(
                f"{case:<22}{row.unhooked_us:>10.0f}{row.streamed_us:>10.0f}{row.extra_us:>8.0f}"
                f"{row.extra_forward_us:>9.0f}{row.extra_process_us:>13.0f}",
                flush=True,
            )
    path = gradient_path(args.rounds)
    print(
        f"gradients to the host: {path['path_gb_s']:.2f} GB/s,"
        f" a plain copy {path['plain_gb_s']:.2f} GB/s: {path['share']:.0%}"
    )
    if args.output is not None:
        result = {"torch": torch.__version__, "rows": [asdict(r) for r in rows], "path": path}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
