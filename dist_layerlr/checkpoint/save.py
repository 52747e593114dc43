"""Save: all that the next process needs to go on, keyed by name, complete or not at all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from dist_layerlr import fields, ranks
from dist_layerlr.checkpoint import folders
from dist_layerlr.checkpoint.dcp import SavePlanner, Scalars, StoredSpan, accept_one_process
from dist_layerlr.checkpoint.deepspeed import engine_state
from dist_layerlr.checkpoint.index import INDEX, WEIGHT, Index
from dist_layerlr.checkpoint.live import Live, describe, look, saved_spans
from dist_layerlr.checkpoint.manifest import Manifest, packed, unpacked
from dist_layerlr.checkpoint.storage import ShardWriter
from dist_layerlr.errors import CheckpointError, ConfigError, LayerLRError
from dist_layerlr.files import write_text
from dist_layerlr.optim.schedulers import check_scheduler, torch_scheduler
from dist_layerlr.plan.diff import PLAN_FILE
from dist_layerlr.plan.entries import Plan
from dist_layerlr.proof.verify import verify
from dist_layerlr.ranks import alike, rank_zero
from dist_layerlr.sharders.replicas import differing


class Saving:
    """A checkpoint that is written, or being written in the background."""

    def __init__(self, hidden: Path, future: Future[Any] | None = None):
        self.path = folders.final_of(hidden)
        """Where it is, or will be."""
        self._hidden, self._future = hidden, future

    def wait(self) -> Path:
        """Return when the checkpoint is complete.

        Raises:
            CheckpointError: it could not be written, on all ranks alike.
        """
        # It is forgotten first, so that a save that failed is told once, not at every later one.
        if _background.saving is self:
            _background.saving = None
        if self._future is not None:
            with worded(self._hidden):
                self._future.result()
        return self.path


@dataclass(slots=True)
class _Background:
    """The one background save that may be under way, and the process group that it talks over."""

    saving: Saving | None = None
    groups: dict[int, Any] | None = None

    def finish(self) -> None:
        """Wait for the save that is under way; it is none any more, whether it fails or not."""
        saving, self.saving = self.saving, None
        if saving is not None:
            saving.wait()

    def group(self) -> Any:
        """A gloo group of its own: its messages must not mix with those of training."""
        if not ranks.in_group():
            return None
        # One group for each world: a program may destroy its process group and make another, and
        # making one is a collective that a save should not pay for every time.
        self.groups = self.groups or {}
        key = id(dist.group.WORLD)
        if key not in self.groups:
            self.groups[key] = dist.new_group(backend="gloo")
        return self.groups[key]


_background = _Background()


def finish_background_save() -> None:
    """Wait for a background save that is under way.

    Raises:
        CheckpointError: it could not be written.
    """
    _background.finish()


def save_checkpoint(
    root: str | Path,
    plan: Plan,
    model: nn.Module,
    optimizer: Any = None,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    frozen: bool | None = None,
    background: bool = False,
) -> Saving:
    """Write a checkpoint that any sharder on any number of ranks loads.

    Collective; call it between steps.

    Args:
        root: folder of checkpoints, shared by all ranks; this one becomes ``root/step_00000010``.
        plan: in force.
        model: as it is trained: plain, DDP, FSDP1, FSDP2, or a DeepSpeed engine.
        optimizer: the one that is stepped; a DeepSpeed engine brings its own.
        step: optimizer steps done.
        extra: more to be kept, by key: schedule, GradScaler, data position ... Objects with
            ``state_dict`` are asked for it; the rest must be JSON-ready. Rank 0's count.
        keep: delete the oldest so that this many remain; None: keep all.
        frozen: save frozen parameters too. None: unless adapters train, whose base is where it came
            from.
        background: copy to the host and return; the files follow. The next save waits for them.

    Returns:
        A handle with the path; ``wait()`` on it after a background save.

    Raises:
        CheckpointError: on all ranks alike, naming file and tensor (one, too, of which ranks hold
            different values: see ``mark_distinct``); older checkpoints stay.
        ConfigError: step or keep out of range, something in ``extra`` that JSON cannot hold, or a
            scheduler that ``check_scheduler`` refuses.
        PlanMismatch: the optimizer does not train what the plan says; nothing is written.
    """
    finish_background_save()
    rank = ranks.rank()

    def collect() -> tuple[Manifest, list[StoredSpan], Scalars]:
        _check_numbers(step, keep)
        return _collect(plan, model, optimizer, step, extra or {}, frozen, rank)

    # 1. Everything that can be refused is refused before a folder exists.
    manifest, spans, numbers = alike(collect)
    # 2. A load puts the plan's rates back: this plan must be the trained one. Copies must agree.
    verify(plan, model, optimizer, factor=manifest.factor)
    _refuse_differing(spans)
    # 3. One rank makes the hidden folder, and all ranks learn its name before they write into it.
    hidden = rank_zero(lambda: folders.begin(Path(root), step) if rank == 0 else Path())

    def finish(index: Index) -> None:
        _complete(hidden, manifest, plan, index, keep)

    # 4. Every rank writes its file; then DCP's coordinator calls ``finish``, which makes the folder
    #    visible. In a background save that is another thread.
    return _write(hidden, spans, numbers, ShardWriter(hidden, rank, finish), background)


def _refuse_differing(spans: list[StoredSpan]) -> None:
    """Of what several ranks hold, one rank's values are written: they must be those of all."""
    found = differing(span for span in spans if span.replicas > 1)
    if found:
        # A weight is the better name: moments that differ follow from it.
        named = min(found, key=lambda difference: not difference.name.startswith(WEIGHT))
        raise CheckpointError(f"Cannot save {named.text}")


def _collect(
    plan: Plan,
    model: nn.Module,
    optimizer: Any,
    step: int,
    extra: Mapping[str, Any],
    frozen: bool | None,
    rank: int,
) -> tuple[Manifest, list[StoredSpan], Scalars]:
    live = look(model, optimizer)
    table = describe(live, frozen=frozen)
    spans, numbers = saved_spans(live, table, rank)
    manifest = Manifest(
        step=step,
        factor=live.factor,
        digest=plan.digest,
        sharder=live.sharder.layout.label,
        ranks=ranks.world_size(),
        optimizer=live.optimizer_class,
        parameters=table,
        extra=_plain(extra),
        objects=tuple(key for key in extra if hasattr(extra[key], "state_dict")),
        sharder_state=engine_state(model),
        optimizers=_by_class(live),
    )
    return manifest, spans, numbers


def _by_class(live: Live) -> dict[str, tuple[str, ...]]:
    """{class of an optimizer: names that it steps, on any rank}."""
    found: dict[str, list[str]] = {}
    for name, kind in live.steppers.items():
        found.setdefault(kind, []).append(name)
    # Tuples, because the manifest is frozen and compared.
    return dict(zip(found, map(tuple, found.values()), strict=True))


def _check_numbers(step: int, keep: int | None) -> None:
    fields.integer(0)("step", step)
    if keep is not None:
        fields.integer(1)("keep", keep)


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``extra``, as a load will return it.

    It is a copy because the caller may change the original before a background save writes it.
    """
    plain = {}
    for key, value in extra.items():
        # A load puts the rates back as plan x one multiplier; this scheduler must agree with that.
        if torch_scheduler(value) is not None:
            check_scheduler(value)
        state = value.state_dict() if hasattr(value, "state_dict") else value
        try:
            plain[key] = unpacked(json.loads(json.dumps(packed(state))))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"Invalid extra[{key!r}]: {error}. Give what JSON can hold."
            ) from None
    return plain


def _complete(hidden: Path, manifest: Manifest, plan: Plan, index: Index, keep: int | None) -> None:
    """On one rank, when the data of all ranks is on disk."""
    # Every rank has fsynced its own file. If one is not seen from here, ranks wrote to local disks.
    absent = [file for file in index.headers if not (hidden / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{absent[0]} is not in {str(hidden)!r}: ranks do not share the folder. Save to one."
        )
    # The manifest comes last, because its presence is what makes a folder a checkpoint, and
    # because it seals the two others.
    crcs = {}
    for name, text in ((PLAN_FILE, plan.to_json() + "\n"), (INDEX, index.to_json() + "\n")):
        write_text(hidden / name, text)
        crcs[name] = zlib.crc32(text.encode())
    manifest.with_files(crcs).write(hidden)
    folders.commit(hidden, keep=keep)


def _write(
    hidden: Path, spans: list[StoredSpan], numbers: Scalars, writer: ShardWriter, background: bool
) -> Saving:
    accept_one_process()
    state = {span.place: span.tensor for span in spans}
    planner = SavePlanner(spans, numbers)
    if not background:
        with worded(hidden):
            save(state, storage_writer=writer, planner=planner)
        return Saving(hidden)
    # DCP copies ``state`` to the host before it returns; from then on training may change it.
    future: Any = async_save(
        state, storage_writer=writer, planner=planner, process_group=_background.group()
    )
    # Newer torch may return two futures, of the staged copy and of the upload: the latter is meant.
    _background.saving = Saving(hidden, getattr(future, "upload_completion", future))
    return _background.saving


@contextmanager
def worded(hidden: Path | None = None) -> Iterator[None]:
    """Raise the first failing rank's error in place of DCP's, which all ranks raise alike.

    Args:
        hidden: the unfinished folder of a save, which is removed.

    Raises:
        CheckpointError: in place of a CheckpointException.
    """
    try:
        yield
    except CheckpointException as caught:
        if hidden is not None:
            folders.abandon(hidden)
        rank, (error, _) = min(caught.failures.items())
        if isinstance(error, LayerLRError):
            raise ranks.shared(error) from None
        failure = CheckpointError(f"Rank {rank}: {type(error).__name__}: {error}")
        raise ranks.shared(failure) from error
