"""One rank that raises anywhere in a load ends all ranks with the same error; none waits."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch.distributed as dist

from dist_layerlr import load_checkpoint, save_checkpoint
from dist_layerlr.checkpoint import load, storage
from dist_layerlr.errors import CheckpointError
from dist_layerlr.sharders.fsdp2 import Fsdp2Sharder
from tests.support.drivers import Native, fsdp2
from tests.support.parity import Recipe
from tests.support.ranks import run_ranks

TOLD = "A part is loaded already"
# (where one rank raises, whether something may have been changed before it)
PLACES: tuple[tuple[Any, str, bool], ...] = (
    (load, "read_manifest", False),
    (load, "read_index", False),
    (load, "look", False),
    (load, "plan_state", False),
    (load, "sample_spans", False),
    (load, "same_values", False),
    (load, "deepcopy", False),
    (load, "weight_targets", True),
    (load, "prepare_state", True),
    (load, "rng_target", True),
    (storage, "_read_into", True),
    (load, "_write_home", True),
    (Fsdp2Sharder, "refresh", True),
    (load, "_multiplier", True),
    (load, "_rebase", True),
    (load, "restore_engine", True),
    (load, "write_rng", True),
    (load, "without_state", True),
)
SAMPLES = ("sample_spans", "same_values")
READS = ("_read_into", "_write_home")


class Kept:
    """An object of the caller."""

    def __init__(self) -> None:
        self.value = 1

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def broken(*_: Any, **__: Any) -> NoReturn:
    raise ZeroDivisionError("rank 1 only")


def raised_alike(work: Callable[[], object]) -> str:
    """The text that every rank raised; fails unless it is the same one everywhere."""
    error: Exception | None = None
    try:
        work()
    except Exception as raised:
        error = raised
    mine = (type(error).__name__, str(error))
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, mine)
    assert isinstance(error, CheckpointError) and all(other == mine for other in heard), heard
    return str(error)


def every_place(rank: int, world_size: int, root: Path) -> list[str]:
    return [*places(rank, root / "lora", True), *places(rank, root / "full", False)]


def places(rank: int, root: Path, lora: bool) -> list[str]:
    """Without adapters there are no samples of a frozen base, so the first read is the load's."""
    driver = Native(fsdp2, Recipe(lora=lora, schedule="lambda"))
    kept = Kept()
    extra = {"kept": kept, "scheduler": driver.scheduler}
    path = save_checkpoint(
        root, driver.plan, driver.model, driver.optimizer, step=0, extra=extra
    ).path

    def attempt() -> None:
        load_checkpoint(path, driver.plan, driver.model, driver.optimizer, extra=extra)

    attempt()
    told = []
    for place, name, changed in PLACES:
        if name in SAMPLES and not lora:
            continue
        if name in READS:
            changed = not lora
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(place, name, broken)
            kept.value = 5
            text = raised_alike(attempt)
        assert "Rank 1: ZeroDivisionError: rank 1 only" in text, (name, text)
        assert (TOLD in text) == changed, (name, text)
        assert changed or kept.value == 5, name
        told.append(name)
    attempt()
    with warnings.catch_warnings():
        # Only rank 0 warns of a forgotten object; under -W error that raises on rank 0 alone.
        warnings.simplefilter("error", UserWarning)
        text = raised_alike(
            lambda: load_checkpoint(path, driver.plan, driver.model, driver.optimizer)
        )
    assert "Rank 0: UserWarning" in text and "was not asked for" in text
    attempt()
    return told


def test_one_rank_that_raises_at_any_step_of_a_load_ends_all_with_its_error(
    tmp_path: Path,
) -> None:
    told = run_ranks(every_place, 2, tmp_path)
    names = [name for _, name, _ in PLACES]
    assert told == [names + [name for name in names if name not in SAMPLES]] * 2
