"""The model of benchmarks/streaming.py, and one builder for every way to train it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_layerlr.offload import StreamPolicy
from dist_layerlr.offload.device import Backend, Cuda, choose
from dist_layerlr.offload.streaming import stream_on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A stack of video transformer blocks."""

    blocks: int
    width: int
    ffn: int
    heads: int
    text: int
    """Tokens that cross attention looks at."""
    rank: int
    """Of the LoRA on every linear layer."""
    dtype: torch.dtype
    flops: float | None = None
    """Operations per second that compute is held to, on few rows; None: as fast as it goes."""


WAN_14B = Size(blocks=40, width=5120, ffn=13824, heads=40, text=512, rank=32, dtype=torch.bfloat16)
"""0.35e9 parameters a block, 28 GB."""
SMALL = Size(
    blocks=16, width=256, ffn=1024, heads=4, text=16, rank=4, dtype=torch.float32, flops=12e9
)
"""For the CPU: 1.05e6 parameters a block, at a tenth of what a core does, so that other load does
not matter."""
ROWS = 16
"""Real tokens of a step that is held to a speed."""


class Clock:
    """Makes stretches of work take a set time; one that ended late shortens the next."""

    def __init__(self) -> None:
        self.seconds = self._start = 0.0
        self.settle()

    def settle(self) -> None:
        """Forget how late the last one was."""
        self._late = 0.0

    def open(self) -> None:
        """A stretch begins."""
        self._start = time.perf_counter() - self._late

    def close(self) -> None:
        """It ends, now or later."""
        end = self._start + self.seconds
        time.sleep(max(0.0, end - time.perf_counter()))
        self._late = time.perf_counter() - end


class _Tick(torch.autograd.Function):
    """Identity that opens or closes a stretch in forward, and does the opposite in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, opens: bool) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        ctx.clock, ctx.opens = clock, opens
        ctx.save_for_backward(x)  # or recomputation would stop short of this
        clock.open() if opens else clock.close()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """(B, T, d) -> (B, T, d)."""
        assert ctx.saved_tensors
        ctx.clock.close() if ctx.opens else ctx.clock.open()
        return grad, None, None


class Adapted(nn.Module):
    """A frozen linear layer and its LoRA, without a dependency on PEFT."""

    def __init__(self, inputs: int, outputs: int, size: Size, device: torch.device | str):
        super().__init__()
        kwargs: dict[str, Any] = {"bias": False, "dtype": size.dtype, "device": device}
        self.base = nn.Linear(inputs, outputs, **kwargs).requires_grad_(False)
        self.lora_A = nn.Linear(inputs, size.rank, **kwargs)
        self.lora_B = nn.Linear(size.rank, outputs, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) -> (B, T, outputs)."""
        base: Tensor = self.base(x)
        return base + self.lora_B(self.lora_A(x))


class Block(nn.Module):
    """Self attention, cross attention, feed-forward, pre-norm, as in Wan."""

    def __init__(self, size: Size, device: torch.device | str, clock: Clock):
        super().__init__()
        self.heads = size.heads
        d = size.width
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(d, elementwise_affine=False) for _ in range(3)
        )
        self.attn1 = nn.ModuleDict(
            {n: Adapted(d, d, size, device) for n in ("to_q", "to_k", "to_v", "to_out")}
        )
        self.attn2 = nn.ModuleDict(
            {n: Adapted(d, d, size, device) for n in ("to_q", "to_k", "to_v", "to_out")}
        )
        self.size, self.clock = size, clock
        self.ffn_in, self.ffn_out = (
            Adapted(d, size.ffn, size, device),
            Adapted(size.ffn, d, size, device),
        )

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, T, d), (B, L, d) -> (B, T, d)."""
        if self.size.flops is not None:
            x = _Tick.apply(x, self.clock, True)
        h = self.norm1(x)
        x = x + self._attend(self.attn1, h, h)
        x = x + self._attend(self.attn2, self.norm2(x), text)
        out: Tensor = self.ffn_out(
            nn.functional.gelu(self.ffn_in(self.norm3(x)), approximate="tanh")
        )
        if self.size.flops is not None:
            out = _Tick.apply(out, self.clock, False)
        return x + out

    def _attend(self, attention: nn.ModuleDict, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (
            attention[n](t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for n, t in (("to_q", x), ("to_k", other), ("to_v", other))
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = attention["to_out"](y.transpose(1, 2).flatten(2))
        return out


class Stack(nn.Module):
    """Blocks under checkpointing."""

    def __init__(self, size: Size, device: torch.device | str):
        super().__init__()
        self.reentrant = False
        self.clock = Clock()
        self.blocks = nn.ModuleList(Block(size, device, self.clock) for _ in range(size.blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """(B, T, d), (B, L, d) -> (B, T, d)."""
        self.clock.settle()
        for block in self.blocks:
            x = checkpoint(block, x, text, use_reentrant=self.reentrant)
        return x


@torch.no_grad()
def make_model(size: Size, device: torch.device | str) -> Stack:
    """The same weights for every arm: blocks differ by a rotation of one random block, which takes
    seconds at 28 GB.
    """
    model = Stack(size, device)
    generator = torch.Generator().manual_seed(0)
    first = dict(model.blocks[0].named_parameters())
    for name, param in first.items():
        value = torch.randn(param.shape, generator=generator) * (
            0.02 if name.endswith("base.weight") else 0.002
        )
        param.copy_(value)
    for i, block in enumerate(model.blocks):
        for name, param in block.named_parameters():
            if i:
                param.copy_(first[name].roll(i, 0))
    return model


@dataclasses.dataclass(kw_only=True)
class Arm:
    """One way to train, ready to step."""

    label: str
    model: nn.Module
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x, text, target) -> loss, gradients accumulated."""
    handle: Any = None
    """Ours."""
    window: int = 1
    overlaps: bool = True
    """Whether ``predict`` speaks of it."""
    close: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._initial = [p.detach().clone() for p in self.parameters]
        self.reset()

    @torch.no_grad()
    def reset(self, tokens: int = 0) -> None:
        """Back to the weights and optimizer of the start.

        A model held to a speed computes as if on that many tokens.
        """
        for block in self.model.modules():
            if isinstance(block, Block) and block.size.flops is not None:
                numel = sum(p.numel() for p in block.parameters())
                block.clock.seconds = (
                    2 * numel * tokens + 4 * tokens**2 * block.size.width
                ) / block.size.flops
        for param, value in zip(self.parameters, self._initial, strict=True):
            param.copy_(value)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def step(self, x: Tensor, text: Tensor, target: Tensor) -> float:
        """One training step. Returns the loss."""
        loss = self.backward(x, text, target)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def stop(self) -> None:
        """Free everything."""
        self.close()
        self.parameters, self._initial = [], []
        del self.model, self.optimizer, self.handle, self.backward, self.close
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _plain(model: Stack) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def backward(x: Tensor, text: Tensor, target: Tensor) -> Tensor:
        x = (
            x.detach().requires_grad_()
        )  # or reentrant checkpointing gives the first block no gradients
        loss = nn.functional.mse_loss(model(x, text).float(), target.float())
        torch.autograd.backward(loss)
        return loss.detach()

    return backward


def resident(size: Size, device: torch.device) -> Arm:
    """Everything on the device."""
    model = make_model(size, device)
    return Arm(label="resident", model=model, backward=_plain(model))


def ours(
    size: Size, backend: Backend, *, window: int = 1, share: float = 0.0, overlap: bool = True
) -> Arm:
    """``stream``, with a share of the blocks resident."""
    model = make_model(size, "cpu")
    resident = round(share * size.blocks)
    policy = StreamPolicy(
        prefetch_window=window, resident_blocks=resident, min_numel=size.width * size.width
    )
    handle = stream_on(backend, model, policy)
    return Arm(
        label=f"ours W={window}"
        + f", {share:.0%} resident" * (resident > 0)
        + ", no overlap" * (not overlap),
        model=model,
        backward=_plain(model),
        handle=handle,
        window=window,
        overlaps=overlap,
        close=handle.remove,
    )


class SerialCuda(Cuda):
    """Waits for every copy before anything else runs: what streaming costs without overlap."""

    def upload(
        self, target: Tensor, source: Tensor, after: Any, then: Callable[[], None] | None
    ) -> Any:
        """Copy, and wait for it."""
        ready = super().upload(target, source, after, then)
        self.synchronize()
        return ready


def naive(size: Size, device: torch.device) -> Arm:
    """Frozen weights of a block go ``.to(device)`` before it runs and ``.to("cpu")`` behind it,
    pageable, waited for.
    """
    model = make_model(size, "cpu")
    model.reentrant = (
        True  # its first forward runs without gradients, which tells it from the recomputation
    )
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.to(device)

    def move(block: nn.Module, target: torch.device | str) -> None:
        for param in block.parameters():
            if not param.requires_grad:
                param.data = param.data.to(target)

    def leave(block: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled():
            move(block, "cpu")

    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, _: move(module, device))
        block.register_forward_hook(leave)
        block.register_full_backward_hook(lambda module, *_: move(module, "cpu"))
    return Arm(label="naive .to()", model=model, backward=_plain(model))


def fsdp2(size: Size, device: torch.device) -> Arm:
    """``fully_shard`` of every block on one rank, shards on the host."""
    import tempfile

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if not dist.is_initialized():
        store = f"file://{tempfile.mkdtemp()}/store"
        kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kind, init_method=store, rank=0, world_size=1)
    model = make_model(size, "cpu")
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (1,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda"),
    }
    for block in model.blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return Arm(label="FSDP2 CPUOffloadPolicy", model=model, backward=_plain(model))


def diffusers_groups(size: Size, device: torch.device) -> Arm:
    """``apply_group_offloading`` by blocks, on a stream where there is one."""
    from diffusers.hooks import apply_group_offloading

    model = make_model(size, "cpu")
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )
    return Arm(label="diffusers group offload", model=model, backward=_plain(model))


class _Chunk(nn.Module):
    """A block for RamTorch, whose chunks pass one tensor on."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.text: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        out: Tensor = self.block(x, self.text)
        return out


def ramtorch(size: Size, device: torch.device) -> Arm:
    """``OffloadModel`` with its own checkpointing, and our window."""
    from ramtorch import OffloadModel

    chunks = [_Chunk(block) for block in make_model(size, "cpu").blocks]
    model = OffloadModel(chunks, device=device, window=3, keep_activations="checkpoint")

    def backward(x: Tensor, text: Tensor, target: Tensor) -> Tensor:
        for chunk in chunks:
            chunk.text = text
        done = model.step(
            x, targets=target, loss_fn=lambda y, t: nn.functional.mse_loss(y.float(), t.float())
        )
        model.flush_grads()
        loss: Tensor = done.loss.detach()
        return loss

    return Arm(label="RamTorch OffloadModel", model=model, backward=backward, close=model.close)


def builders(size: Size, device: torch.device) -> dict[str, Callable[[], Arm]]:
    """{key: builder} of every arm that can run here, resident first."""
    found: dict[str, Callable[[], Arm]] = {"resident": partial(resident, size, device)}
    for window in (1, 2, 3):
        found[f"window{window}"] = lambda window=window: ours(size, choose(device), window=window)
    for share in (0.25, 0.5):
        found[f"share{share:.2f}"] = lambda share=share: ours(size, choose(device), share=share)
    if device.type == "cuda":
        found["serial"] = lambda: ours(size, SerialCuda(device), overlap=False)
    found["naive"] = partial(naive, size, device)
    found["fsdp2"] = partial(fsdp2, size, device)
    if importlib.util.find_spec("diffusers"):
        found["diffusers"] = partial(diffusers_groups, size, device)
    if importlib.util.find_spec("ramtorch"):
        found["ramtorch"] = partial(ramtorch, size, device)
    return found


@contextlib.contextmanager
def kernels(exact: bool) -> Iterator[None]:
    """Deterministic ones, which are slower, when losses are compared bit by bit."""
    if not exact:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
