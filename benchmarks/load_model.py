"""Part `base_model` of checkpoint.py: a pretrained model into shards, beside `from_pretrained`.

`theirs` is what most trainers do: every rank calls from_pretrained, then shards (fully_shard,
deepspeed.initialize). `ours`: an empty model, sharded, then load_pretrained. The model is
diffusers' Wan at the widths of Wan 2.1 1.3B, four blocks of its thirty: 0.2 billion parameters in
fp32 in two files, read from the page cache, where it costs nothing that every rank reads all of
them. Each round measures from building the model to a model that can be called. Peak memory is the
growth of the rank's resident set; what deepspeed.initialize adds for gradients and buckets, on a
GPU machine in its memory and the same both ways, is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SHARDERS = ("fsdp2", "zero 3")
Load = Callable[[Path], Any]


def base_model(rank: int, only: str | None, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """Rows of the table: time and peak memory of the slowest, largest rank."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    folder = scratch / "wan"
    import diffusers.utils

    diffusers.utils.logging.disable_progress_bar()
    if rank == 0:
        build().save_pretrained(folder, max_shard_size="500MB")
        print(
            f"{'base model':<12}{'load s':>18}{'':>7}{'load peak MB':>18}{'':>7}   of"
            f" {size_mb(folder):.0f} MB"
        )
        print(f"{'sharder':<12}" + f"{'theirs':>9}{'ours':>9}{'ratio':>7}" * 2)
    dist.barrier()
    rows = []
    for sharder in SHARDERS:
        if only in (None, sharder):
            rows.append(row(sharder, folder, rounds))
            if rank == 0:
                print_row(rows[-1])
    return rows


def build() -> Any:
    """The model, initialised at random."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=12,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=4096,
        freq_dim=256,
        ffn_dim=8960,
        num_layers=4,
    )


def row(sharder: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians of both ways, which take turns."""
    arms: dict[str, Load] = {
        "theirs": from_pretrained_fsdp2 if sharder == "fsdp2" else from_pretrained_zero3,
        "ours": straight_fsdp2 if sharder == "fsdp2" else straight_zero3,
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in arms if number % 2 else reversed(arms):
            numbers = measure(arms[name], folder)
            if number:  # the first warms up
                taken[name].append(numbers)
    found: dict[str, Any] = {"sharder": sharder, "model_mb": size_mb(folder)}
    for name, series in taken.items():
        seconds, peaks = zip(*series, strict=True)
        found[name] = {
            "load_s": statistics.median(seconds),
            "load_peak_mb": statistics.median(peaks),
        }
    pairs = zip(taken["ours"], taken["theirs"], strict=True)
    found["ratio"] = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
    return found


class Peak:
    """Growth of this process's resident set, with pauses."""

    def start(self) -> None:
        """From here on."""
        self._highest = 0.0
        self._resume_at(0.0)

    def _resume_at(self, grown: float) -> None:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the kernel's peak begins at what is resident now
        self._base = resident_mb("VmRSS") - grown

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is allocated inside."""
        grown, self._highest = resident_mb("VmRSS") - self._base, self.mb()
        yield
        self._resume_at(grown)

    def mb(self) -> float:
        """The highest so far."""
        return max(self._highest, resident_mb("VmHWM") - self._base)


PEAK = Peak()


def measure(load: Load, folder: Path) -> tuple[float, float]:
    """(seconds, growth of the resident set in MB) of the worst rank."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a load would reuse what the one before it has freed
    dist.barrier()
    PEAK.start()
    start = time.perf_counter()
    model = load(folder)
    numbers = torch.tensor([time.perf_counter() - start, PEAK.mb()], dtype=torch.float64)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    if hasattr(model, "destroy"):
        destroy(model)
    return float(numbers[0]), float(numbers[1])


def destroy(model: Any) -> None:
    """DeepSpeed keeps destroyed engines alive, with all their memory.

    At least they can be emptied.
    """
    model.destroy()
    optimizer = model.optimizer
    for param in model.parameters():
        del param.ds_tensor
    for left in (optimizer, model):
        vars(left).clear()


def from_pretrained_fsdp2(folder: Path) -> Any:
    """A whole model on every rank, then sharded."""
    from diffusers import WanTransformer3DModel

    return shard(WanTransformer3DModel.from_pretrained(folder))


def straight_fsdp2(folder: Path) -> Any:
    """Sharded, then read."""
    from dist_layerlr.sharders import materialize
    from dist_layerlr.weights import load_pretrained

    model = shard(empty(folder))
    materialize(model, "cpu")
    load_pretrained(model, folder)
    return model


def from_pretrained_zero3(folder: Path) -> Any:
    """A whole model on every rank, then partitioned."""
    import deepspeed
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder)
    deepspeed.zero.Init(module=model, config_dict_or_path=zero_config())  # as initialize would
    return engine(model)


def straight_zero3(folder: Path) -> Any:
    """Partitioned, then read."""
    from dist_layerlr.sharders import partition_empty
    from dist_layerlr.weights import load_pretrained

    model = empty(folder)
    partition_empty(model, zero_config())
    started = engine(model)
    load_pretrained(started, folder)
    return started


def empty(folder: Path) -> Any:
    """The model without memory."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel

    with init_empty_weights(include_buffers=False):
        return WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))


def shard(model: Any) -> Any:
    """FSDP2, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def engine(model: Any) -> Any:
    """ZeRO-3 with SGD: no optimizer state in the way of the measurement."""
    import deepspeed

    with contextlib.redirect_stdout(None), PEAK.paused():
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=zero_config())[0]


def zero_config() -> dict[str, Any]:
    """Stage 3, fp32."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def size_mb(folder: Path) -> float:
    """Of the weights on disk."""
    return float(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20)


def resident_mb(key: str) -> float:
    """A row of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def print_row(found: dict[str, Any]) -> None:
    """One line of the table."""
    theirs, ours = found["theirs"], found["ours"]
    text = f"{found['sharder']:<12}{theirs['load_s']:>9.2f}{ours['load_s']:>9.2f}"
    text += f"{found['ratio']:>7.2f}"
    ratio = ours["load_peak_mb"] / theirs["load_peak_mb"]
    print(
        text + f"{theirs['load_peak_mb']:>9.0f}{ours['load_peak_mb']:>9.0f}{ratio:>7.2f}",
        flush=True,
    )
