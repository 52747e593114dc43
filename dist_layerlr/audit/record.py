"""Reads the live optimizer around one step on this rank, and writes what this rank has seen.

Nothing here is collective, and nothing is written into the script's own objects: a rank may train
another model than the others, or fail where they do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dist_layerlr.audit.changes import Schedules, group_problems
from dist_layerlr.audit.models import Labels, find_models, infos_of
from dist_layerlr.errors import LayerLRError
from dist_layerlr.files import write_json
from dist_layerlr.optim.readback import (
    LiveParam,
    factor_in_force,
    live_params,
    live_pieces,
    repeated,
)
from dist_layerlr.optim.segmented import Segmented
from dist_layerlr.optim.trial import try_here
from dist_layerlr.proof.effect import Sight, watched
from dist_layerlr.ranks import Problem, rank, world_size
from dist_layerlr.sharders import Pieces, Sharder, sharder_of
from dist_layerlr.sharders.base import local
from dist_layerlr.sharders.replicas import fingerprint

Row = dict[str, Any]
_ASKED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What accelerate's launcher sets, and what it then promises."""


@dataclass(frozen=True, kw_only=True)
class _View:
    """One model, as one optimizer is about to step it."""

    label: str
    sharder: Sharder
    held: Pieces
    live: Mapping[str, LiveParam]
    """Rates before the step: an engine moves its schedule on within it."""
    factor: float
    prints: list[Tensor]
    look: Callable[[], list[Sight]]


class Recorder:
    """What this process has seen so far; the file is written anew after every step watched."""

    def __init__(
        self,
        folder: str,
        created: Mapping[Any, list[dict[str, float]]],
        stepped: Mapping[Any, int],
    ):
        self._folder, self._created, self._stepped = Path(folder), created, stepped
        self._models: dict[str, Row] = {}
        self._names: dict[str, dict[str, Row]] = {}
        self._problems: dict[Problem, None] = {}
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        """Of optimizers and engines, by their first watched steps."""
        self._began: dict[int, dict[int, int]] = {}
        """{number: steps that the others had done when it began}."""
        self._labels = Labels()
        self._said: set[tuple[str, int]] = set()
        self._schedules = Schedules()
        self._open = ExitStack()

    def watch(self, stepper: Any, *, first: bool, fresh: bool) -> Callable[[], None]:
        """Look at everything before a step; returns what looks again after it, and writes.

        Args:
            stepper: a torch optimizer, or a DeepSpeed engine.
            first: whether it was not watched before.
            fresh: whether gradients are those that the step will use.
        """
        # Told by what only an engine has: asking by class would import DeepSpeed into every script.
        is_engine = hasattr(stepper, "zero_optimization_stage")
        # An engine is its own model; around its inner optimizer nobody could tell names.
        models = [stepper] if is_engine else find_models(self._live(stepper))
        if stepper not in self._numbers:
            # Numbers: the object must not be kept alive by us, since a script may drop it.
            self._numbers[stepper] = len(self._began)
            self._began[self._numbers[stepper]] = self._counts()
        number = self._numbers[stepper]
        # Of a step that raised, nobody has taken the hooks off.
        self._open.close()
        stack = self._open = ExitStack()
        views: list[_View] = []
        for model in models:
            view = self._view(model, None if is_engine else stepper, stack, fresh)
            if view is not None:
                views.append(view)
        # A trial or a stale tensor is the same at every step, and a trial costs time: once is
        # enough.
        if first:
            self._check(stepper, views, is_engine)
        for kind, text in self._group_problems(stepper, views):
            # A schedule's rates differ from step to step: what is wrong with them is said once.
            if (kind, number) not in self._said:
                self._said.add((kind, number))
                self._problems[kind, text] = None

        # Not collective: some ranks of the script may never come here, so each writes what it saw.
        def finish() -> None:
            # Hooks come off before anything is compared; what they have seen stays readable.
            stack.close()
            for view in views:
                self._merge(number, view)
            self._write()

        return finish

    def _live(self, stepper: Any) -> list[Any]:
        # A copy of the keys: a weak dictionary may shrink while it is walked.
        return [stepper, *(o for o in list(self._created) if o is not stepper)]

    def _counts(self) -> dict[int, int]:
        return {number: self._stepped.get(o, 0) for o, number in self._numbers.items()}

    def _take_turns(self, number: int, others: Iterable[int]) -> bool:
        """Whether another optimizer has stepped since this one began: a second stage has not."""
        before, now = self._began[number], self._counts()
        return any(now.get(other, 0) > before.get(other, 0) for other in others if other != number)

    def _view(
        self, model: nn.Module, optimizer: Any, stack: ExitStack, fresh: bool
    ) -> _View | None:
        sharder, label = sharder_of(model), self._labels.of(model)
        try:
            held = live_pieces(sharder, optimizer)
            look = stack.enter_context(watched(sharder, optimizer, held, gradients=fresh))
        except LayerLRError as error:
            # The sharder refuses what it would read wrong (round_robin_gradients, pipelines): that
            # is a finding, not a failure of the audit.
            self._problems["unreadable", f"{label}: {error}"] = None
            return None
        # Once: modules that appear later are rare, and describing walks the whole model.
        if label not in self._models:
            self._describe(label, sharder)
        return _View(
            label=label,
            sharder=sharder,
            held=held,
            live=live_params(held),
            factor=factor_in_force(held),
            prints=_prints(held),
            look=look,
        )

    def _describe(self, label: str, sharder: Sharder) -> None:
        self._models[label] = {
            "sharder": sharder.layout.label,
            "parameters": {
                info.name: {
                    "shape": list(info.shape),
                    "trainable": info.trainable,
                    "class": info.owner_class,
                }
                for info in infos_of(sharder)
            },
        }
        for key, what in _ASKED.items():
            # Accelerate drops the plugin on a machine without an accelerator, and trains on.
            asked = os.environ.get(key, "").lower() in ("1", "true")
            if asked and world_size() > 1 and sharder.layout.name in ("none", "ddp"):
                text = f"{label}: {what} was asked for, and the model is {sharder.layout.label}"
                self._problems["sharder", text] = None

    def _check(self, stepper: Any, views: list[_View], is_engine: bool) -> None:
        """What needs to be looked at once: tensors of nobody's, a trial, an engine's defaults."""
        if is_engine:
            self._check_engine(stepper, views)
        else:
            self._check_strangers(stepper, views)
        for view in views:
            known = self._models[view.label]["parameters"]
            shapes = [tuple(row["shape"]) for row in known.values() if row["trainable"]]
            owners = [piece.owner for piece in view.held.pieces]
            # Whole parameters are stepped as they would be without us: nothing to try.
            if view.sharder.layout.shards and view.held.optimizer is not None:
                verdict = try_here(view.held.optimizer, view.sharder.layout, owners, shapes)
                if verdict is not None and verdict.fault is not None:
                    text = f"{verdict.optimizer}, tried on {verdict.way}: {verdict.fault}"
                    self._problems["mixing", text] = None

    def _check_engine(self, engine: Any, views: list[_View]) -> None:
        for view in views:
            if view.held.strangers:
                text = f"{view.held.strangers} tensors are no parameters of {view.label}"
                self._problems["stale", text] = None
        # DeepSpeed 0.19.8 clips at 1.0 unless it is told, where other trainers do not clip.
        clip = float(engine.gradient_clipping())
        # Private, read in 0.19.8: the config as the script gave it, without defaults.
        given = getattr(getattr(engine, "_config", None), "_param_dict", {})
        if clip > 0 and "gradient_clipping" not in given:
            text = f"DeepSpeed clips gradients at {clip:g}, which its config does not say"
            self._problems["clipping", text] = None

    def _check_strangers(self, optimizer: Any, views: list[_View]) -> None:
        kept = {id(piece.owner) for view in views for piece in view.held.pieces}
        strangers = [
            p for group in optimizer.param_groups for p in group["params"] if id(p) not in kept
        ]
        # A tensor of no module may well train, if it has a gradient: it is in a graph.
        stale = sum(1 for p in strangers if p.grad is None)
        kind = type(optimizer).__name__
        if stale:
            text = f"{stale} tensors in {kind} belong to no model that trains"
            self._problems["stale", text] = None
        if len(strangers) > stale:
            text = f"{len(strangers) - stale} tensors in {kind} train outside any module"
            self._problems["outside", text] = None

    def _group_problems(self, stepper: Any, views: list[_View]) -> list[Problem]:
        found: list[Problem] = []
        for inner in {id(v.held.optimizer): v.held.optimizer for v in views}.values():
            # Of segments the outer group holds one rate by design; those planned are inside.
            live = inner.inner if isinstance(inner, Segmented) else inner
            if live is not None and live in self._created:
                found += group_problems(type(live).__name__, self._created[live], live.param_groups)
            # This step is counted already, and not done yet: no schedule has followed it.
            done = self._stepped.get(stepper, 1) - 1
            found += self._schedules.problems((stepper, inner), done)
        return found

    def _merge(self, number: int, view: _View) -> None:
        names = self._names.setdefault(view.label, {})
        optimizer = view.held.optimizer
        twice = set(repeated(view.held))
        # Several pieces of a name have one rate; any of them tells it.
        sights: dict[str, Sight] = {s.name: s for s in view.look() if s.rate is not None}
        groups = getattr(getattr(optimizer, "inner", optimizer), "param_groups", [])
        numbers = {id(group): i for i, group in enumerate(groups)}
        after = _prints(view.held)
        for piece, old, new in zip(view.held.pieces, view.prints, after, strict=True):
            row = names.setdefault(piece.name, {"optimizers": [], "moved": False})
            if piece.numel and number not in row["optimizers"]:
                row["optimizers"].append(number)
            # On the device until here: one comparison waits for each piece, a few times per run.
            row["moved"] |= bool(old != new)
            if self._take_turns(number, row["optimizers"]):
                twice.add(piece.name)
            row["twice"] = row.get("twice", False) or piece.name in twice
            one = view.live[piece.name]
            # The first watched step is reported; what later ones add is movement and state.
            if "lr" not in row:
                row |= {
                    "algorithm": type(getattr(optimizer, "inner", optimizer)).__name__,
                    "group": piece.group.get("name", numbers.get(id(piece.group))),
                    "lr": one.lr,
                    "initial_lr": one.initial_lr,
                    "weight_decay": one.weight_decay,
                    "elements": one.numel,
                    "replicas": one.replicas,
                    "factor": view.factor,
                }
            # lora_A has no direction at the first step, since lora_B is 0 until then.
            if "observed" not in row:
                row |= _effect(sights.get(piece.name), one.lr)
            row["gradient"] = row.get("gradient") or _has_gradient(piece)
            if piece.numel:
                row["master"] = _short(piece.owner.dtype)
                row["state"] = _state_types(optimizer, piece.owner) or row.get("state", {})
        self._note_waiting(view)

    def _note_waiting(self, view: _View) -> None:
        """Names that an optimizer holds which is not stepped yet: two networks take turns."""
        waiting = self._models[view.label].setdefault("waiting", [])
        for other in list(self._created):
            # An optimizer that has begun speaks for itself, and an engine has no other one.
            if not self._stepped.get(other) and not view.sharder.layout.engine_steps:
                held = view.sharder.pieces(other).pieces
                waiting += sorted({piece.name for piece in held} - set(waiting))

    def _write(self) -> None:
        write_json(
            # A restarted job has the same ranks again, in other processes: no attempt may write
            # over the file that another one is writing.
            self._folder / f"rank{rank():05d}.{os.getpid()}.json",
            {
                "rank": rank(),
                "ranks": world_size(),
                "models": self._models,
                "names": self._names,
                "problems": list(self._problems),
            },
        )


def _prints(held: Pieces) -> list[Tensor]:
    """A number per piece that follows from its bits: what few elements show may be unmoved."""
    with torch.no_grad():
        return [fingerprint(piece.of(piece.owner).contiguous()) for piece in held.pieces]


def _effect(sight: Sight | None, lr: float) -> Row:
    # Where rounding hides the rate, saying nothing is right: `moved` still tells that it trains.
    if sight is None or not sight.driven or not sight.shows(lr):
        return {}
    return {"observed": sight.rate, "obeys": not sight.differs(lr)}


def _has_gradient(piece: Any) -> bool | None:
    """None: nothing here tells (DeepSpeed frees gradients, and keeps them elsewhere before)."""
    gradient = piece.owner.grad
    if gradient is None or not piece.numel:
        return None
    # FSDP1 leaves an unsharded gradient in some of its modes: its elements are other ones.
    if local(gradient).numel() != local(piece.owner).numel():
        return None
    return bool(piece.of(gradient).any())


def _state_types(optimizer: Any, owner: Tensor) -> dict[str, str]:
    """Precision of what an optimizer keeps per element; counters are left out."""
    held = optimizer.state.get(owner, {}) if optimizer is not None else {}
    return {
        key: _short(value.dtype)
        for key, value in held.items()
        if isinstance(value, Tensor) and value.ndim > 0
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
