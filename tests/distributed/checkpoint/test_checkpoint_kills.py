"""SIGKILL at random moments of a run that saves every step: every restart goes on, and the end is
the undisturbed one."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from dist_layerlr import PlanSchedule, Schedule, load_checkpoint, save_checkpoint
from dist_layerlr.checkpoint import folders
from dist_layerlr.checkpoint.index import read_index
from dist_layerlr.checkpoint.manifest import read_manifest
from dist_layerlr.checkpoint.storage import broken
from tests.support.drivers import Native, fsdp2
from tests.support.parity import Recipe, Weights, micro_batches

RANKS, KEEP = 2, 2
LONGEST_S = 0.5
"""A kill comes within this time after training began or went on; a step with its save takes about
0.05."""
DEADLINE_S = 600.0
DONE = "weights.pt"


def train(rank: int, steps: int, store: str, root: Path, running: Any) -> None:
    """One rank: resume, train, save after every step, now and then in the background."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=DEADLINE_S),
    )
    driver = Native(fsdp2, Recipe())
    schedule = PlanSchedule(
        driver.optimizer, Schedule(kind="cosine", warmup_steps=2, total_steps=steps + 1)
    )
    extra = {"schedule": schedule}
    if folders.complete_checkpoints(root):
        load_checkpoint(root, driver.plan, driver.model, driver.optimizer, extra=extra)
    running.set()
    while schedule.last_step < steps:
        for x, y in micro_batches(schedule.last_step, 1):
            driver.backward(F.mse_loss(driver.model(x), y))
        driver.step()
        schedule.step()
        done = schedule.last_step
        save_checkpoint(
            root,
            driver.plan,
            driver.model,
            driver.optimizer,
            step=done,
            extra=extra,
            keep=KEEP,
            background=done % 3 == 0,
        )
    full = driver.full()
    if rank == 0:
        torch.save(full, root / (DONE + ".tmp"))
        (root / (DONE + ".tmp")).rename(root / DONE)
    dist.barrier()
    os._exit(0)


def attempt(
    root: Path, steps: int, chooser: random.Random, kill_after_s: float | None = None
) -> bool:
    """Start the job and kill it, rank after rank in either order. Returns whether it was done
    before."""
    context = mp.get_context("fork")
    running, store = context.Event(), str(root.parent / f"store{chooser.random()}")
    ranks = [
        context.Process(target=train, args=(r, steps, store, root, running), daemon=True)
        for r in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        assert running.wait(DEADLINE_S), "never began"
        if kill_after_s is None:
            for process in ranks:
                process.join(DEADLINE_S)
        else:
            ranks[0].join(kill_after_s)
            chooser.shuffle(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return (root / DONE).exists()


def check_visible(root: Path) -> int:
    """Every folder that looks like a checkpoint is whole. Returns the newest step."""
    for path in folders.complete_checkpoints(root):
        manifest = read_manifest(path)
        assert broken(path, read_index(path, manifest), 0, 1) == [], path
        assert manifest.step == folders.step_of(path)
    assert {p.name for p in root.glob("step_*")} == {
        p.name for p in folders.complete_checkpoints(root)
    }
    return folders.step_of(folders.latest(root)) if folders.complete_checkpoints(root) else 0


def survive(kills: int, steps: int, seed: int, tmp_path: Path) -> None:
    """Runs that are killed again and again, until so many kills have come before an end."""
    chooser = random.Random(seed)
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert attempt(undisturbed, steps, chooser)
    wanted: Weights = torch.load(undisturbed / DONE)
    killed, runs = 0, 0
    while killed < kills:
        root = tmp_path / f"run{runs}"
        root.mkdir()
        newest, done = 0, False
        while not done and killed < kills:
            done = attempt(root, steps, chooser, chooser.uniform(0.0, LONGEST_S))
            killed += not done
            before, newest = newest, check_visible(root)
            assert newest >= before, "the newest checkpoint is lost"
        assert done or attempt(root, steps, chooser)
        ended: Weights = torch.load(root / DONE)
        assert all(torch.equal(ended[name], wanted[name]) for name in wanted), root
        assert (check_visible(root), len(folders.complete_checkpoints(root))) == (steps, KEEP)
        runs += 1
    print(f"{killed} kills in {runs} runs of {steps} steps")


def test_a_few_kills(tmp_path: Path) -> None:
    survive(3, 12, 0, tmp_path)


@pytest.mark.full
def test_thirty_kills(tmp_path: Path) -> None:
    survive(30, 40, 1, tmp_path)
