"""An exception that nobody was prepared for: every rank ends, and the one where it happened says
where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dist_layerlr.errors import CheckpointError
from dist_layerlr.ranks import RankFailure, alike, any_rank, is_shared
from launch import train
from launch.trainer import request
from tests.support.ranks import run_ranks


def fail_on_the_last(rank: int, world_size: int) -> tuple[str, bool, str | None, bool, bool]:
    """What this rank hears, whether all hear it, and the cause that it can show."""

    def work() -> None:
        if rank == world_size - 1:
            raise ValueError("broken")

    seen = any_rank(rank == 1), any_rank(False)
    try:
        alike(work)
    except RankFailure as error:
        mine = error.__cause__
        cause = None if mine is None else type(mine.__cause__).__name__
        return str(error), is_shared(error), cause, *seen
    raise AssertionError("no rank heard of the failure")


def test_every_rank_hears_of_an_unexpected_exception_and_one_keeps_its_cause() -> None:
    said = "Rank 1: ValueError: broken"
    assert run_ranks(fail_on_the_last, 2) == [
        (said, True, None, True, False),
        (said, True, "ValueError", True, False),
    ]


def test_alone_the_cause_stays() -> None:
    with pytest.raises(CheckpointError, match="Rank 0: ZeroDivisionError") as caught:
        alike(lambda: 1 // 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_defect_shows_its_traceback_and_bad_input_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def defect(*_: object, **__: object) -> None:
        alike(lambda: {}["missing"])

    monkeypatch.setattr(train, "load_options", defect)
    assert train.main(["--config", "c.json"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and 'alike(lambda: {}["missing"])' in said
    assert said.endswith("train.py: error: Rank 0: KeyError: 'missing'\n")
    monkeypatch.undo()
    assert train.main(["--config", "nowhere.json"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_two_sharders_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    args = request.make_parser(None).parse_args(
        ["--config", "c", "--sharding", "ddp", "--deepspeed_config", "d"]
    )
    with pytest.raises(Exception, match="Invalid --sharding with --deepspeed_config"):
        request.make_request(args)


def test_ranks_that_do_not_find_each_other_begin_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The harness of these tests: gloo may lose a connection before any work has run."""
    connect = dist.init_process_group

    def once_in_vain(*args: Any, rank: int, **more: Any) -> None:
        marker = tmp_path / str(rank)
        if not marker.exists():
            marker.touch()
            raise RuntimeError("Connection closed by peer")
        connect(*args, rank=rank, **more)

    monkeypatch.setattr(dist, "init_process_group", once_in_vain)
    assert run_ranks(lambda rank, size: (rank, size), 2) == [(0, 2), (1, 2)]
