"""Run one function on several gloo ranks: a hang is a failure, not a wait."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tests.support.patience import Patience

CONNECTS = 3
"""Gloo's ranks sometimes close a connection while they meet, on a machine that is busy."""
GROUP_TIMEOUT_S = 1200.0
"""How long a collective waits for the other ranks; on a busy machine one may be far behind."""


class Unconnected(AssertionError):
    """A rank that could not join the process group."""


def run_ranks(work: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``work(rank, world_size, *args)`` on every rank of a fresh process group; return the
    results by rank.

    Ranks are forked, so the parent must not have run a backward pass, and nothing may be pickled
    but results.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or hangs.
    """
    for _ in range(CONNECTS - 1):
        # Nothing of the work has run when ranks do not find each other: they begin anew.
        with contextlib.suppress(Unconnected):
            return _run_once(work, world_size, args)
    return _run_once(work, world_size, args)


def _run_once(work: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> list[Any]:
    context = mp.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(
                target=_rank, args=(work, rank, world_size, store, queue, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(queue, ranks, world_size)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(queue: Any, ranks: list[Any], world_size: int) -> list[Any]:
    results: dict[int, Any] = {}
    patience = Patience([process.pid for process in ranks])
    while len(results) < world_size:
        if ends := patience.ends():
            missing = sorted(set(range(world_size)) - results.keys())
            raise AssertionError(f"ranks {missing}: {ends}")
        try:
            rank, good, value = queue.get(timeout=1.0)
        except mp.queues.Empty:  # type: ignore[attr-defined]
            dead = [
                i for i, p in enumerate(ranks) if p.exitcode not in (None, 0) and i not in results
            ]
            assert not dead, f"ranks {dead} died with {[ranks[i].exitcode for i in dead]}"
            continue
        if good is None:
            raise Unconnected(f"rank {rank} did not reach the others:\n{value}")
        assert good, f"rank {rank} raised:\n{value}"
        results[rank] = value
    return [results[rank] for rank in range(world_size)]


def _rank(
    work: Callable[..., Any],
    rank: int,
    world_size: int,
    store: str,
    queue: Any,
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # DeepSpeed collects garbage in each engine, and the parent's imports are most of the heap: out
    # of the collector's sight they cost nothing.
    gc.freeze()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    _forget_accelerate()
    connected = False
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        connected = True
        queue.put((rank, True, work(rank, world_size, *args)))
    except BaseException:
        queue.put((rank, False if connected else None, traceback.format_exc()))
    finally:
        queue.close()
        queue.join_thread()
        # Without interpreter shutdown: gloo's threads may outlive an exception.
        os._exit(0)


def _forget_accelerate() -> None:
    """Drop what an Accelerator of an earlier test left in Accelerate's classes: a fork inherits it,
    and the next Accelerator would take this rank for the only one."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
