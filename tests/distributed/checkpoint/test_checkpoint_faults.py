"""Checkpoints that are damaged, of another model, or cannot be written: one error on all ranks,
nothing changed."""

from __future__ import annotations

import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dist_layerlr import Plan, load_checkpoint, save_checkpoint, verify
from dist_layerlr.checkpoint import resume_plan
from dist_layerlr.checkpoint.rng import read_rng
from dist_layerlr.errors import CheckpointError, ConfigError
from dist_layerlr.optim import optimizer_state
from dist_layerlr.sharders import sharder_of
from tests.support.drivers import Native, fsdp1, fsdp1_flat, fsdp2
from tests.support.parity import Recipe, micro_batches
from tests.support.ranks import run_ranks

TOLD = r"is damaged or incomplete: .*, at (weight|optim|rng)\."


def train(driver: Native, steps: int = 1, first: int = 0) -> None:
    for step in range(first, first + steps):
        for x, y in micro_batches(step, 1):
            driver.backward(F.mse_loss(driver.model(x), y))
        driver.step()


def make(recipe: Recipe | None = None, wrap: Any = fsdp2) -> Native:
    return Native(wrap, recipe or Recipe())


def state(driver: Native) -> dict[str, torch.Tensor]:
    """A copy of all that a load could change on this rank."""
    found = {w.name: w.tensor.clone() for w in sharder_of(driver.model).weights()}
    for name, pieces in optimizer_state(driver.model, driver.optimizer).items():
        for piece in (p for p in pieces if all(t.numel() for t in p.tensors.values())):
            found |= {
                f"{name}@{piece.start}.{key}": value.clone() for key, value in piece.tensors.items()
            }
    return found | {"rng": read_rng()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refuses(driver: Native, path: Path, match: str, plan: Plan | None = None) -> None:
    """The load fails with one text on all ranks, and the running job is what it was."""
    before = state(driver)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(path, plan or driver.plan, driver.model, driver.optimizer)
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(caught.value))
    assert len(set(texts)) == 1, texts
    assert same(before, state(driver))
    verify(driver.plan, driver.model, driver.optimizer)


def on_one(work: Callable[[], Any]) -> None:
    if dist.get_rank() == 0:
        work()
    dist.barrier()


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 16]))


def saved(root: Path) -> tuple[Native, Path]:
    driver = make()
    train(driver, 2)
    return driver, save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=2).path


def a_flipped_byte(root: Path) -> None:
    driver, path = saved(root)
    train(driver, first=2)
    chooser = random.Random(5)
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        shard = file.suffix == ".safetensors"
        for place in [chooser.randrange(size) for _ in range(4)] + [size - 2]:
            on_one(lambda file=file, place=place: flip(file, place))
            refuses(driver, path, f"{file.name}' is damaged" + (".*, at " if shard else ""))
            on_one(lambda file=file, place=place: flip(file, place))
    load_checkpoint(path, driver.plan, driver.model, driver.optimizer)


def a_missing_or_short_shard(root: Path) -> None:
    driver, path = saved(root)
    train(driver, first=2)
    shard = path / "rank_00001.safetensors"
    moved = path / "aside"
    on_one(lambda: shard.rename(moved))
    refuses(driver, path, r"rank_00001\.safetensors' is damaged or incomplete: No such file")
    on_one(lambda: shard.write_bytes(moved.read_bytes()[:-100]))
    refuses(driver, path, r"rank_00001\.safetensors' " + TOLD.replace(".*", "it ends too early"))
    for name in ("index.json", "plan.json"):
        on_one(lambda name=name: (path / name).rename(path / "gone"))
        refuses(driver, path, rf"{name}' is damaged or incomplete: No such file")
        on_one(lambda name=name: (path / "gone").rename(path / name))
    refuses(driver, root / "nowhere", "No checkpoint in")


class Wider(Recipe):
    def model(self) -> nn.Module:
        model: Any = super().model()
        model.last = nn.Linear(model.last.in_features, 5)
        return model


class Longer(Recipe):
    def model(self) -> nn.Module:
        model: Any = super().model()
        model.more = nn.Linear(2, 2)
        return model


def another_model(root: Path) -> None:
    _, path = saved(root)
    refuses(
        make(Wider()),
        path,
        r"of another model: last\.weight has shape \(3, 19\) in the checkpoint, \(5, 19\)",
    )
    refuses(make(Longer()), path, r"of another model: it lacks more\.weight, more\.bias")
    for recipe, told in ((Wider(), r"last\.weight has shape"), (Longer(), "it lacks more")):
        with pytest.raises(
            CheckpointError, match=f"of another model: {told}"
        ):  # before any difference between plans
            resume_plan(path, make(recipe).plan)
    refuses(
        make(Recipe(optimizer="sgd")),
        path,
        "trained with AdamW, the live optimizer is SGD. Use AdamW.",
    )
    longer = make(Longer())
    other = save_checkpoint(
        root / "longer", longer.plan, longer.model, longer.optimizer, step=0
    ).path
    refuses(make(), other, r"it has more\.weight, more\.bias, which the model does not have")


def another_base(root: Path) -> None:
    recipe = Recipe(lora=True)
    driver = make(recipe)
    train(driver)
    path = save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=1).path
    files = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    whole = save_checkpoint(
        root / "all", driver.plan, driver.model, driver.optimizer, step=1, frozen=True
    ).path
    frozen = [w for w in sharder_of(driver.model).weights() if not w.trainable]
    assert files < sum(f.stat().st_size for f in whole.glob("*.safetensors")) - 4 * sum(
        w.numel for w in frozen
    )
    other = make(recipe)
    with torch.no_grad():
        for weight in sharder_of(other.model).weights():
            if not weight.trainable:
                weight.tensor.mul_(1.5)
    refuses(
        other, path, r"trained on another base model: frozen .* has other values. Load the base"
    )
    load_checkpoint(whole, other.plan, other.model, other.optimizer)
    assert same(state(driver), state(other))


def a_full_disk(root: Path) -> None:
    """A limit on the size of files stands for the disk; one rank hits it."""
    driver, path = saved(root)
    train(driver, first=2)
    before = state(driver)
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    for background in (False, True):
        with pytest.raises(
            CheckpointError,
            match=r"rank_00001\.safetensors', at (weight|optim)\..*: File too large",
        ):
            save_checkpoint(
                root, driver.plan, driver.model, driver.optimizer, step=3, background=background
            ).wait()
        dist.barrier()
        assert sorted(f.name for f in root.iterdir()) == ["latest", "step_00000002"]
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(before, state(driver))
    train(driver, first=3)
    save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=4)
    load_checkpoint(path, driver.plan, driver.model, driver.optimizer)


def a_background_save(root: Path) -> None:
    """Holds the moment of the call, whatever is trained on; the next save waits for it."""
    for wrap in (fsdp2, fsdp1, fsdp1_flat):
        driver, twin = make(wrap=wrap), make(wrap=wrap)
        train(driver, 2)
        random.seed(dist.get_rank())
        torch.manual_seed(dist.get_rank())
        before = state(driver)
        folder = root / wrap.__name__
        save_checkpoint(
            folder, driver.plan, driver.model, driver.optimizer, step=2, background=True
        )
        train(driver, 2, first=2)
        torch.rand(3), random.random(), numpy.random.rand()
        last = save_checkpoint(
            folder, driver.plan, driver.model, driver.optimizer, step=4, background=True
        )
        restored = load_checkpoint(folder / "step_00000002", twin.plan, twin.model, twin.optimizer)
        assert same(before, state(twin)), wrap
        assert (restored.step, last.wait().name) == (2, "step_00000004")


def an_eval_forward_before_a_save(root: Path) -> None:
    """FSDP leaves the root gathered after a forward without a backward."""
    for wrap in (fsdp2, fsdp1, fsdp1_flat, lambda m: fsdp1(m, strategy="SHARD_GRAD_OP")):
        driver, twin = make(wrap=wrap), make(wrap=wrap)
        train(driver, 2)
        before = state(driver)
        with torch.no_grad():
            driver.model(torch.randn(2, 7))
        path = save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=2).path
        load_checkpoint(path, twin.plan, twin.model, twin.optimizer)
        after = state(twin)
        assert all(torch.equal(before[key], after[key]) for key in before if key != "rng"), wrap


def stepped_unevenly(root: Path) -> None:
    """Two names with different counters cannot share one: said, not guessed."""
    driver = make()
    train(driver, 1)
    for name, param in driver.model.named_parameters():
        if name == "gate" and "step" in driver.optimizer.state[param]:  # one rank has its element
            driver.optimizer.state[param]["step"].fill_(7.0)
    path = save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=1).path
    refuses(
        make(wrap=fsdp1_flat),
        path,
        "were saved with .*7.0.* with one counter. Resume under the sharder",
    )
    back = make()
    load_checkpoint(path, back.plan, back.model, back.optimizer)
    assert same(state(driver), state(back))


class WithoutPatch(Recipe):
    def model(self) -> nn.Module:
        model: Any = super().model()
        model.patch.weight.requires_grad_(False)
        return model


def unfrozen_beside_others(root: Path) -> None:
    """A name without a counter would take its neighbours': 2.5 times its rate after 1000 steps."""
    name = "patch.weight"
    driver = make(WithoutPatch())
    train(driver, 1)
    path = save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=1).path
    refuses(
        make(wrap=fsdp1_flat),
        path,
        f"{name} was frozen and has no step counter, .* Resume under DDP or FSDP2",
    )
    back = make()
    assert name in load_checkpoint(path, back.plan, back.model, back.optimizer).fresh


def what_json_cannot_hold(root: Path) -> None:
    driver = make()
    with pytest.raises(ConfigError, match=r"Invalid extra\['x'\]: .*set"):
        save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=0, extra={"x": {1}})
    assert not root.exists()


class Stubborn:
    """The caller's object; it takes no state on rank 1."""

    def __init__(self) -> None:
        self.state = 1

    def state_dict(self) -> dict[str, int]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if dist.get_rank() == 1 and state["state"] == 1:
            raise ValueError("not with me")
        self.state = state["state"]


def an_extra_that_refuses(root: Path) -> None:
    driver = make()
    path = save_checkpoint(
        root, driver.plan, driver.model, driver.optimizer, step=0, extra={"x": Stubborn()}
    ).path
    live = Stubborn()
    live.state = 5
    train(driver)
    before = state(driver)
    with pytest.raises(
        CheckpointError,
        match=r"extra\['x'\] does not take its saved state: ValueError: not with me",
    ):
        load_checkpoint(path, driver.plan, driver.model, driver.optimizer, extra={"x": live})
    assert live.state == 5 and same(before, state(driver))


class ChannelsLast(Recipe):
    def model(self) -> nn.Module:
        model: Any = super().model()
        model.patches = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        return model


def memory_in_another_order(root: Path) -> None:
    """FSDP1 flattens such a parameter in memory order: its runs are no runs of elements."""
    for wrap in (fsdp1, fsdp1_flat):
        driver = make(ChannelsLast(), wrap)
        with pytest.raises(
            ConfigError,
            match=r"patches\.weight was not contiguous \(channels_last.* Make it contiguous",
        ):
            save_checkpoint(root, driver.plan, driver.model, driver.optimizer, step=0)
    assert not root.exists()


CASES = (
    a_flipped_byte,
    a_missing_or_short_shard,
    another_model,
    another_base,
    a_full_disk,
    a_background_save,
    an_eval_forward_before_a_save,
    stepped_unevenly,
    unfrozen_beside_others,
    what_json_cannot_hold,
    an_extra_that_refuses,
    memory_in_another_order,
)


def on_rank(rank: int, world_size: int, root: Path) -> None:
    for case in CASES:
        print(case.__name__, flush=True)
        case(root / case.__name__)


def test_faults_are_told_on_all_ranks_alike_and_change_nothing(tmp_path: Path) -> None:
    run_ranks(on_rank, 2, tmp_path)
