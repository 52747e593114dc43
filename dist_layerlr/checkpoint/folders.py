"""Folders of checkpoints: each is complete or invisible, whatever moment the process dies at. Pure.

A checkpoint grows in a hidden folder, is renamed when all of it is on disk, and only then does the
``latest`` file point to it. It is hidden again before it is deleted, so that half a deletion looks
like no checkpoint either.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from dist_layerlr.errors import CheckpointError
from dist_layerlr.files import sync_folder, write_text

MANIFEST = "checkpoint.json"
"""Its presence tells a checkpoint from a folder of checkpoints."""
POINTER = "latest"
CHECKPOINTS = "checkpoints"
"""Folder of checkpoints in a run's output folder."""
_SAVING, _DELETING = ".saving-", ".deleting-"
# The step, and the attempt: a second save of one step stands beside the first until it is complete.
_NAME = re.compile(r"step_(\d{8,})(?:-(\d+))?")


def begin(root: Path, step: int) -> Path:
    """Create the hidden folder of a new checkpoint, and remove what killed saves left behind."""
    root.mkdir(parents=True, exist_ok=True)
    for left in root.iterdir():
        if left.name.startswith((_SAVING, _DELETING)):
            shutil.rmtree(left)
    hidden = root / (_SAVING + _free_name(root, step))
    hidden.mkdir()
    return hidden


def commit(hidden: Path, *, keep: int | None = None) -> Path:
    """Make a complete hidden folder visible, point ``latest`` to it, then delete what is too many.

    Args:
        hidden: what ``begin`` returned; its files are on disk.
        keep: how many checkpoints stay, this one included; None: all. One of the same step is
            replaced in any case.
    """
    root, final = hidden.parent, final_of(hidden)
    # The order is what makes every moment safe. The folder's entries are on disk before its name
    # is, and its name is before the pointer to it is; a rename is atomic, so that a reader sees
    # the old pointer or the new one. Deleting comes last, when the new checkpoint can be found.
    sync_folder(hidden)
    hidden.rename(final)
    sync_folder(root)
    write_text(root / POINTER, final.name + "\n")
    sync_folder(root)
    others = [folder for folder in complete_checkpoints(root) if folder != final]
    replaced = [folder for folder in others if step_of(folder) == step_of(final)]
    kept = [folder for folder in others if folder not in replaced]
    old = kept[: max(len(kept) - keep + 1, 0)] if keep is not None else []
    for folder in replaced + old:
        _delete(folder)
    return final


def abandon(hidden: Path) -> None:
    """Remove a hidden folder after a failed save."""
    shutil.rmtree(hidden, ignore_errors=True)


def final_of(hidden: Path) -> Path:
    """What ``commit`` will make of a hidden folder."""
    return hidden.parent / hidden.name.removeprefix(_SAVING)


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints in a folder, in the order in which they were written."""
    found: list[tuple[int, str, Path]] = []
    if root.is_dir():
        for folder in root.iterdir():
            if _NAME.fullmatch(folder.name) and is_checkpoint(folder):
                # Time orders them, not the step: a run that went back writes a lower one later.
                found.append(((folder / MANIFEST).stat().st_mtime_ns, folder.name, folder))
    return [folder for _, _, folder in sorted(found)]


def latest(folder: str | Path) -> Path:
    """The checkpoint that ``folder`` is, or the newest complete one in it or its ``checkpoints``.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(folder)
    if is_checkpoint(folder):
        return folder
    if complete_checkpoints(folder / CHECKPOINTS):
        folder /= CHECKPOINTS
    try:
        pointed = folder / (folder / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        pointed = folder
    # A damaged pointer, or one to a checkpoint that was deleted, is passed over. The pattern keeps
    # it inside the folder.
    if pointed.parent == folder and _NAME.fullmatch(pointed.name) and is_checkpoint(pointed):
        return pointed
    found = complete_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"No checkpoint in {str(folder)!r}: it holds no complete step_* folder. Check the path."
        )
    return found[-1]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint."""
    return (folder / MANIFEST).is_file()


def step_of(folder: Path) -> int:
    """Optimizer step in a checkpoint's name; -1 for another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _free_name(root: Path, step: int) -> str:
    """``step_00000010``, or ``step_00000010-1`` beside one that is there already.

    The earlier one must stay until this one is complete.
    """
    attempts: list[int] = []
    for folder in root.iterdir():
        match = _NAME.fullmatch(folder.name)
        if match and int(match[1]) == step:
            attempts.append(int(match[2] or 0))
    return f"step_{step:08d}" + (f"-{max(attempts) + 1}" if attempts else "")


def _delete(folder: Path) -> None:
    # Hidden first, in one step: a process that dies within rmtree leaves no half checkpoint.
    hidden = folder.with_name(_DELETING + folder.name)
    folder.rename(hidden)
    shutil.rmtree(hidden)
