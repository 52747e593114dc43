"""Each ``steer.json`` is read once, wherever a run is killed between its two moves."""

from __future__ import annotations

import json
from pathlib import Path

from launch.trainer.inbox import READ, STEER, Inbox


def put(out: Path, text: str = '{"save": true}') -> None:
    (out / STEER).write_text(text)


def names(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*.json"))


def begun(out: Path, *known: str, continued: bool = True) -> tuple[Inbox, list[str]]:
    said: list[str] = []
    inbox = Inbox(out, said.append)
    inbox.begin(known, continued=continued)
    return inbox, said


def read(inbox: Inbox, done: int) -> str | None:
    found = inbox.take(done)
    return None if found is None else inbox.keep(found, done)


def test_a_file_is_moved_twice_and_read_once(tmp_path: Path) -> None:
    inbox, _ = begun(tmp_path)
    assert not inbox.waiting(3) and inbox.take(3) is None
    put(tmp_path)
    assert inbox.waiting(3)
    found = inbox.take(3)
    assert found is not None and found.raw == {"save": True}
    assert names(tmp_path) == [f"{READ}/reading.json"]
    assert inbox.keep(found, 3) == "step_00000003.json"
    assert names(tmp_path) == [f"{READ}/step_00000003.json"]
    assert not inbox.waiting(3) and read(inbox, 3) is None
    put(tmp_path)
    # A second one between the same two steps does not replace the first.
    assert read(inbox, 3) == "step_00000003.1.json"


def test_a_restart_reads_what_its_checkpoint_lacks_at_the_same_steps(tmp_path: Path) -> None:
    first, _ = begun(tmp_path)
    for done in (2, 4, 4, 7):
        put(tmp_path, json.dumps({"min_ratio": done / 10}))
        read(first, done)
    second, _ = begun(tmp_path, "step_00000002.json")
    assert not second.waiting(3) and second.take(3) is None
    assert [read(second, 4), read(second, 4), read(second, 4)] == [
        "step_00000004.json",
        "step_00000004.1.json",
        None,
    ]
    # A new file comes after what is due, and does not wait for what is not.
    put(tmp_path)
    assert (read(second, 5), read(second, 7)) == ("step_00000005.json", "step_00000007.json")


def test_a_file_that_was_taken_up_before_the_kill_is_read_first(tmp_path: Path) -> None:
    killed, _ = begun(tmp_path)
    put(tmp_path, '{"min_ratio": 0.5}')
    killed.take(3)
    put(tmp_path)
    inbox, _ = begun(tmp_path)
    first, second = inbox.take(0), None
    assert first is not None and first.raw == {"min_ratio": 0.5} and not first.again
    inbox.keep(first, 0)
    second = inbox.take(0)
    assert second is not None and second.raw == {"save": True}


def test_a_bad_file_is_put_aside_with_its_error(tmp_path: Path) -> None:
    inbox, _ = begun(tmp_path)
    put(tmp_path, '{"save": true, "save": false}')
    found = inbox.take(5)
    assert found is not None and "key 'save' is given twice" in (found.error or "")
    inbox.refuse(found, 5)
    assert names(tmp_path) == [f"{READ}/refused_00000005.json"]
    assert not inbox.waiting(5)


def test_another_run_in_the_folder_has_none_of_the_files(tmp_path: Path) -> None:
    inbox, _ = begun(tmp_path)
    put(tmp_path)
    read(inbox, 1)
    put(tmp_path, '{"end": true}')
    other, said = begun(tmp_path, continued=False)
    assert not other.waiting(10)
    assert names(tmp_path) == [f"{READ}/unread.json"]
    assert said == [f"{tmp_path / STEER} was there before the run: moved, not read"]


def test_what_a_killed_run_had_taken_up_is_kept_beside_what_came_later(tmp_path: Path) -> None:
    inbox, _ = begun(tmp_path)
    put(tmp_path, '{"save": true}')
    assert inbox.take(1) is not None
    put(tmp_path, '{"end": true}')
    _, said = begun(tmp_path, continued=False)
    assert len(said) == 2
    assert names(tmp_path) == [f"{READ}/unread.1.json", f"{READ}/unread.json"]
    assert (tmp_path / READ / "unread.json").read_text() == '{"save": true}'


def test_a_folder_that_takes_no_file_is_said_once_and_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / READ).write_text("in the way")
    inbox, said = begun(tmp_path)
    put(tmp_path)
    assert inbox.take(1) is None and not inbox.waiting(2)
    assert len(said) == 1 and said[0].startswith("steer.json is not read any more: ")
    assert (tmp_path / STEER).exists()


def test_what_is_no_file_is_refused_like_a_bad_one(tmp_path: Path) -> None:
    inbox, _ = begun(tmp_path)
    (tmp_path / STEER).mkdir()
    found = inbox.take(1)
    assert found is not None and found.error is not None
    inbox.refuse(found, 1)
    assert not inbox.waiting(1)
