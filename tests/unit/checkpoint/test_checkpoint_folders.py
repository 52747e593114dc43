"""Folders of checkpoints: a process that dies at any operation leaves the newest complete one, and
no half one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_layerlr.checkpoint import folders
from dist_layerlr.checkpoint.manifest import Manifest, TensorRecord, model_problem, read_manifest
from dist_layerlr.errors import CheckpointError
from dist_layerlr.files import write_text


def save(root: Path, step: int, keep: int | None = None) -> Path:
    hidden = folders.begin(root, step)
    (hidden / "data").write_text(f"{step}")
    write_text(hidden / folders.MANIFEST, json.dumps({"step": step}))
    return folders.commit(hidden, keep=keep)


def names(root: Path) -> list[str]:
    return [f.name for f in folders.complete_checkpoints(root)]


def whole(folder: Path) -> bool:
    """Everything that ``save`` writes, and nothing cut off."""
    return (
        (folder / "data").read_text()
        == str(folders.step_of(folder))
        == str(json.loads((folder / folders.MANIFEST).read_text())["step"])
    )


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Die before the n-th operation on the file system."""
    left = [10**9]

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return work(*args, **kwargs)

        return call

    for place, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "open"),
        (Path, "write_text"),
        (os, "fsync"),
        (os, "replace"),
        (os, "rmdir"),
        (os, "unlink"),
        (os, "open"),
    ):
        quick = (lambda _: None) if name == "fsync" else getattr(place, name)
        monkeypatch.setattr(place, name, counted(quick))
    yield lambda count: left.__setitem__(0, count)
    left[0] = 10**9


def test_death_before_any_operation_leaves_the_newest_complete_checkpoint(
    tmp_path: Path, dying: Callable[[int], None]
) -> None:
    died = 0
    for keep in (1, 2):
        for again in (3, 2):  # a new step, and one that exists
            for count in range(200):
                root = tmp_path / f"{keep}-{again}-{count}"
                save(root, 1)
                save(root, 2)
                dying(count)
                try:
                    save(root, again, keep)
                    finished = True
                except Killed:
                    finished = False
                    died += 1
                dying(10**9)
                found = folders.latest(root)
                visible = folders.complete_checkpoints(root)
                assert all(whole(folder) for folder in visible), (keep, again, count)
                assert folders.step_of(found) in (2, again)
                assert not finished or folders.step_of(found) == again
                last = save(root, 4, keep)
                assert folders.latest(root) == last
                assert not [f for f in root.iterdir() if f.name.startswith(".")]
                shutil.rmtree(root)
                if finished:
                    break
            else:
                pytest.fail("never finished")
    assert died > 60


def test_the_newest_stay_and_the_one_just_written_always_does(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_00000020", "step_00000030"]
    assert save(tmp_path, 5, keep=1) == folders.latest(tmp_path) == tmp_path / "step_00000005"
    assert names(tmp_path) == ["step_00000005"]


def test_a_step_that_is_saved_again_is_replaced_without_a_gap(tmp_path: Path) -> None:
    assert save(tmp_path, 7).name == "step_00000007"
    assert save(tmp_path, 7).name == "step_00000007-1"
    assert names(tmp_path) == ["step_00000007-1"]
    assert save(tmp_path, 7).name == "step_00000007-2"
    save(tmp_path, 8)
    save(tmp_path, 8, keep=2)
    assert names(tmp_path) == ["step_00000007-2", "step_00000008-1"]


def test_latest_takes_a_checkpoint_a_pointer_or_the_newest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint in .*no complete step_"):
        folders.latest(tmp_path)
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert folders.latest(first) == first
    (tmp_path / folders.POINTER).write_text("step_00000001\n")
    assert folders.latest(tmp_path) == first
    for pointer in ("step_00000009", "../elsewhere", ""):
        (tmp_path / folders.POINTER).write_text(pointer)
        assert folders.latest(tmp_path) == second


MANIFEST = Manifest(
    step=3,
    factor=0.5,
    digest="d",
    sharder="fsdp2",
    ranks=2,
    optimizer="AdamW",
    extra={"samples": 24},
    parameters={
        "a.weight": TensorRecord(
            shape=(2, 3), dtype="float32", trainable=True, aliases=("b.weight",)
        ),
        "c": TensorRecord(shape=(4,), dtype="float32", trainable=False),
    },
)


def test_a_manifest_reads_back_and_any_changed_byte_is_seen(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path)
    assert read_manifest(tmp_path) == MANIFEST
    path = tmp_path / folders.MANIFEST
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            assert read_manifest(tmp_path) == MANIFEST  # white space
        except CheckpointError as error:
            assert "checkpoint.json" in str(error)


def test_another_model_is_told_by_names_and_shapes() -> None:
    same = {"a.weight": ((2, 3), ("b.weight",)), "c": ((4,), ())}
    assert model_problem(MANIFEST, same) is None
    assert model_problem(MANIFEST, {"b.weight": ((2, 3), ()), "c": ((4,), ())}) is None
    assert "it lacks d" in str(model_problem(MANIFEST, {**same, "d": ((1,), ())}))
    assert "it has c, which the model does not have" in str(
        model_problem(MANIFEST, {"a.weight": same["a.weight"]})
    )
    wrong = {**same, "c": ((5,), ())}
    assert model_problem(MANIFEST, wrong) == "c has shape (4,) in the checkpoint, (5,) in the model"
