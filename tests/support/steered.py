"""A run that is changed while it trains, and the same training in a loop that sets rates by hand.

The loop shares nothing with the plan: components, rates, schedule and what each change does are
written out here.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from launch import train
from launch.trainer import loop, steering
from launch.trainer.batches import Batches
from launch.trainer.data import fit_dataset, open_dataset
from launch.trainer.families import get_family
from launch.trainer.families.base import live_config
from launch.trainer.inbox import Inbox
from launch.trainer.job import Job
from launch.trainer.options import load_options
from launch.trainer.runtime import Runtime
from launch.trainer.state import Position

STEPS, WARMUP, FLOOR, BATCH = 200, 5, 0.1, 2
RATES = {"self_attn": 0.02, "cross_attn": 0.01, "ffn": 0.02, "norm": 0.01, "default": 0.02}
"""Attention and feed-forwards share a rate, hence a group, until a change parts them."""
Changes = Mapping[int, str]
"""{steps done: what steer.json holds then}."""


def component(name: str) -> str:
    if ".norm" in name:
        return "norm"
    parts = {".attn1.": "self_attn", ".attn2.": "cross_attn", ".ffn.": "ffn"}
    return next((found for part, found in parts.items() if part in name), "default")


def schedule(step: int, floor: float) -> float:
    """Linear warmup and a cosine, as the config asks."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    x = (step - WARMUP) / (STEPS - 1 - WARMUP)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * x))


def by_hand(
    config: Path, folder: Path, factor: Callable[[str, int], float], floor: Callable[[int], float]
) -> dict[str, Tensor]:
    """Weights of one process that writes ``lr`` itself before every step.

    Args:
        config: What is trained.
        folder: Where nothing is written.
        factor: (name, step) -> what the rate of its component is multiplied by.
        floor: step -> the schedule's.
    """
    options = load_options(config)
    family = get_family(options.model_type)
    model = WanTransformer3DModel.from_pretrained(options.model_path).train()
    data = open_dataset(options.data)
    fit_dataset(data, family, live_config(model))
    runtime = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    job = Job(
        engine=SimpleNamespace(model=model),  # type: ignore[arg-type]
        family=family,
        objective=family.objective(options.objective, Path(options.model_path)),
        data=data,
        options=options,
        runtime=runtime,
        folder=folder,
        run_id="",
    )
    batches = Batches(job, Position())
    named = dict(model.named_parameters())
    groups = [{"params": [p], "lr": 0.0, "name": name} for name, p in named.items()]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.01)
    for step in range(STEPS):
        for number in range(step * BATCH, (step + 1) * BATCH):
            batch = batches.read([number])
            (job.objective.loss(model, batch, [number], 0) / BATCH).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            rate = RATES[component(group["name"])] * factor(group["name"], step)
            group["lr"] = rate * schedule(step, floor(step))
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in named.items()}


def start(
    rank: int,
    world_size: int,
    call: list[str],
    changes: Changes,
    kill: tuple[str, int] | None,
) -> tuple[int, str, str]:
    """Run train.py; rank 0 finds the changes on its way, each once however often the run starts.

    Args:
        rank: Of this process.
        world_size: Of all.
        call: Arguments of train.py, the output folder last.
        changes: Each is there when that many steps are done.
        kill: (``taken`` or ``kept``, steps done): SIGKILL at once after the file was moved so far.
    """
    train.stop = lambda: None
    out = Path(call[-1])
    written = out.parent / "written"
    step, take, keep = loop._step, Inbox.take, Inbox.keep

    def stepped(team: Any, number: int, *rest: Any) -> Any:
        if rank == 0 and number + 1 in changes and not (written / str(number + 1)).exists():
            written.mkdir(exist_ok=True)
            (written / str(number + 1)).touch()
            (out / "steer.new").write_text(changes[number + 1])
            (out / "steer.new").rename(out / steering.STEER)
        mine = (team.face.plan.digest, team.steering.factor(number))
        everyone: list[Any] = [None] * world_size
        dist.all_gather_object(everyone, mine)
        assert set(everyone) == {mine}, f"ranks differ before step {number}: {everyone}"
        return step(team, number, *rest)

    def die(after: str, done: int) -> None:
        if (after, done) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def taken(inbox: Inbox, done: int) -> Any:
        found = take(inbox, done)
        die("taken", done)
        return found

    def kept(inbox: Inbox, found: Any, done: int) -> str:
        name = keep(inbox, found, done)
        die("kept", done)
        return name

    loop._step, Inbox.take, Inbox.keep = stepped, taken, kept
    said, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        status = train.main(call)
    return status, said.getvalue(), complaint.getvalue()


def asks(**content: Any) -> str:
    return json.dumps(content)
