"""Batches made ahead of the step: the same ones, no wait of the host, and errors told at once."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_layerlr.errors import ModelSourceError
from launch.trainer import loop
from launch.trainer.data.base import to_device
from launch.trainer.data.digits import MovingDigits
from launch.trainer.data.order import sample_index
from launch.trainer.prefetch import AHEAD, Prefetch, pinned
from tests.support.jobs import call_of, run_in_ranks, weights

CPU = torch.device("cpu")
READ = MovingDigits.__getitem__


def with_workers(config: dict[str, Any], workers: int, **train: Any) -> dict[str, Any]:
    return {**config, "train": {**config["train"], "workers": workers, "steps": 3, **train}}


def test_what_comes_next_is_made_meanwhile_and_no_more_than_that() -> None:
    made: list[int] = []
    many, second, release = threading.Event(), threading.Event(), threading.Event()

    def make(key: int) -> int:
        if key == 0 and not release.is_set():
            release.wait(60)
        made.append(key)
        if key == 1:
            second.set()
        if len(made) == 1 + AHEAD * 2:
            many.set()
        return key * key

    ahead = Prefetch(make, iter(range(20)), 2, CPU)
    # The second is ready before the first: the order is still that of the keys.
    assert second.wait(60)
    threading.Timer(0.1, release.set).start()
    assert ahead.get(0) == 0
    # Nobody asks, and yet the next four are made; a fifth would need memory for nothing.
    assert many.wait(60)
    time.sleep(0.1)
    assert sorted(made) == [0, 1, 2, 3, 4]
    assert [ahead.get(key) for key in range(1, 20)] == [key * key for key in range(1, 20)]
    # What nobody expected is made at once.
    assert ahead.get(7) == 49
    ahead.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("data")]
    by_itself = Prefetch(make, iter(range(3)), 0, CPU)
    made.clear()
    assert (by_itself.get(0), made) == (0, [0])


def test_a_batch_is_its_own_pinned_copy_where_nothing_is_pinned() -> None:
    batch = {"latents": torch.ones(2), "names": ["a"], "parts": [torch.zeros(1)]}
    assert pinned(batch, CPU) is batch
    moved = to_device(batch, CPU)
    assert torch.equal(moved["parts"][0], batch["parts"][0]) and moved["names"] == ["a"]


def test_threads_read_the_same_samples_in_the_same_order(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = tmp_path / "threads"

    def slow(data: MovingDigits, index: int) -> Any:
        with threads.open("a") as file:
            file.write(f"{threading.current_thread().name.split('_')[0]}\n")
        # Neighbours take different times, so that they are ready in another order.
        time.sleep(0.004 * (index % 3))
        return READ(data, index)

    monkeypatch.setattr(MovingDigits, "__getitem__", slow)
    calls = []
    for workers in (0, 3):
        config = with_workers(run_config, workers, micro_batch=1)
        calls.append(call_of(config, tmp_path / str(workers), "--sharding", "ddp"))
    plain, ahead = run_in_ranks(2, calls)
    assert (plain.status, ahead.status) == (0, 0), ahead.complaint
    one, other = weights(tmp_path / "0"), weights(tmp_path / "3")
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = []
    for workers in ("0", "3"):
        lines = (tmp_path / workers / "out" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    names = threads.read_text().split()
    # 24 samples of one run, and the same number of the other; each rank looks at one before.
    assert names.count("data") == 24 and names.count("MainThread") >= 24


def test_a_sample_that_one_ranks_thread_cannot_read_ends_all_ranks_in_one_line(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the second step, in the second half of the batch: rank 1 reads it, and rank 0 never does.
    broken = sample_index(8 + 6, 1000, 0)

    def damaged(data: MovingDigits, index: int) -> Any:
        if index == broken:
            raise ModelSourceError(f"sample {index} is damaged")
        return READ(data, index)

    monkeypatch.setattr(MovingDigits, "__getitem__", damaged)
    call = call_of(with_workers(run_config, 2, micro_batch=2), tmp_path, "--sharding", "ddp")
    (ended,) = run_in_ranks(2, [call])
    assert ended.status == 2
    assert ended.complaint.splitlines() == [f"train.py: error: sample {broken} is damaged"]
    # The step before it was trained: what is ahead of a step does not end it.
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0]


class Reads(TorchDispatchMode):
    """Counts how often the host reads a value of a tensor, and so waits for its device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Ranks tell each other flags, whole numbers, through host memory.
            self.count += args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


def test_no_microbatch_makes_the_host_wait_for_a_number(
    run_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, counts = loop._step, tmp_path / "counts"

    def counted(*args: Any) -> Any:
        with Reads() as reads:
            found = step(*args)
        with counts.open("a") as file:
            file.write(f"{reads.count}\n")
        return found

    monkeypatch.setattr(loop, "_step", counted)
    calls = []
    for micro in (8, 1):
        config = with_workers(run_config, 2, micro_batch=micro)
        calls.append(call_of(config, tmp_path / str(micro)))
    whole, parts = run_in_ranks(1, calls)
    assert (whole.status, parts.status) == (0, 0), parts.complaint
    read = [int(line) for line in counts.read_text().split()]
    # Eight microbatches read no more numbers than one: each is of a sample's noise or of the step.
    assert read[:3] == read[3:]
