"""One builder for every way to train the model of benchmarks/streaming.py."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_layerlr.offload import StreamPolicy
from dist_layerlr.offload.device import Accelerator, Backend, accelerator, choose
from dist_layerlr.offload.streaming import stream_on
from streaming_model import Block, Size, Stack, make_model


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
        # Reentrant checkpointing gives a block gradients only if an input requires one.
        x = x.detach().requires_grad_()
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


def _on_device(size: Size, device: torch.device, *, window: int = 1, share: float = 0.0) -> Arm:
    # The backend is made with the arm, not with the list of arms: it holds streams and events.
    return ours(size, choose(device), window=window, share=share)


class Serial(Accelerator):
    """Waits for every copy before anything else runs: what streaming costs without overlap."""

    def upload(
        self, target: Tensor, source: Tensor, after: Any, then: Callable[[], None] | None
    ) -> Any:
        """Copy, and wait for it."""
        ready = super().upload(target, source, after, then)
        self.synchronize()
        return ready


def naive(size: Size, device: torch.device) -> Arm:
    """Move the frozen weights of a block to the device before it runs, and back behind it.

    The copies are ``.to(...)`` from pageable memory, and each is waited for.
    """
    model = make_model(size, "cpu")
    # Under reentrant checkpointing the first forward runs without gradients, which tells it from
    # the recomputation.
    model.reentrant = True
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
    from ramtorch import OffloadModel  # type: ignore[import-not-found, unused-ignore]

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
        found[f"window{window}"] = partial(_on_device, size, device, window=window)
    for share in (0.25, 0.5):
        found[f"share{share:.2f}"] = partial(_on_device, size, device, share=share)
    if device.type == "cuda":
        found["serial"] = lambda: ours(size, accelerator(device, Serial), overlap=False)
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
