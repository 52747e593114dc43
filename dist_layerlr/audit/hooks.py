"""Hooks in a training process: which groups optimizers were given, and their first steps.

Imported while torch itself is being imported, so torch is imported inside functions only.
"""

from __future__ import annotations

import functools
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dist_layerlr.audit.bootstrap import FOLDER, STEPS

if TYPE_CHECKING:
    from dist_layerlr.audit.record import Recorder

GIVEN_KEYS = ("lr", "weight_decay", "lr_scale", "lr_mult", "lr_multiplier", "lr_scale_factor")
"""What of a group is kept as it was given; all but two are multipliers that a trainer may read."""
PATIENCE = 64
"""Steps at a rate of 0 that are waited for: schedules begin with warmup."""


@dataclass
class _State:
    """Of this process."""

    created: WeakKeyDictionary[Any, list[dict[str, float]]] = field(
        default_factory=WeakKeyDictionary
    )
    """Optimizer: its groups as they were given."""
    stepped: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary)
    """Optimizer or engine: steps done."""
    watched: WeakKeyDictionary[Any, int] = field(default_factory=WeakKeyDictionary)
    open: list[Any] = field(default_factory=list)
    """Optimizers and engines whose step runs now, outermost first."""
    finish: Callable[[], None] | None = None
    """Ends the watch of the outermost one."""
    busy: bool = False
    """Whether the audit itself is at work: optimizers that it tries are none of the script's."""
    recorder: Recorder | None = None


_state = _State()


def install(module: ModuleType) -> None:
    """Hook a module that was just imported: torch's optimizers or DeepSpeed's engine."""
    if module.__name__ == "torch.optim.optimizer":
        kind = module.Optimizer
        kind.add_param_group = _noting(kind.add_param_group)
        module.register_optimizer_step_pre_hook(_before_step)
        module.register_optimizer_step_post_hook(lambda optimizer, *_: _end(optimizer))
    else:
        engine = module.DeepSpeedEngine
        engine.step = _around(engine.step)


def _noting(add: Callable[..., Any]) -> Callable[..., Any]:
    """``add_param_group``, through which every optimizer takes its groups."""

    @functools.wraps(add)
    def add_param_group(self: Any, param_group: Any) -> Any:
        result = add(self, param_group)
        if not _state.busy:
            _safely(lambda: _note(self))
        return result

    return add_param_group


def _note(optimizer: Any) -> None:
    group = optimizer.param_groups[-1]
    kept = {key: float(group[key]) for key in GIVEN_KEYS if _is_number(group.get(key))}
    # Numbers alone: a reference to the group would keep its tensors alive.
    kept["params"] = float(len(group["params"]))
    _state.created.setdefault(optimizer, []).append(kept)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and value.numel() == 1)


def _around(step: Callable[..., Any]) -> Callable[..., Any]:
    """``DeepSpeedEngine.step``, in which the torch optimizer is stepped once per group."""

    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Between boundaries a step only counts micro-batches.
        if not self.is_gradient_accumulation_boundary():
            return step(self, *args, **kwargs)
        _begin(self)
        try:
            return step(self, *args, **kwargs)
        finally:
            _end(self)

    return stepped


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # torch hands over what `step` was called with, the optimizer first. A closure runs the backward
    # pass within the step (as Lightning's does): what stands in `grad` now is the last step's.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    _begin(optimizer, fresh=closure is None)


def _begin(stepper: Any, *, fresh: bool = True) -> None:
    if _state.busy:
        return
    if stepper in _state.open:  # its last step raised, and the script went on
        del _state.open[_state.open.index(stepper) :]
    _state.open.append(stepper)
    # An optimizer inside another (segments, look-ahead), or inside an engine, is part of its step.
    if len(_state.open) == 1:
        _safely(lambda: _watch(stepper, fresh))


def _watch(stepper: Any, fresh: bool) -> None:
    _state.finish = None
    done = _state.stepped[stepper] = _state.stepped.get(stepper, 0) + 1
    seen = _state.watched.get(stepper, 0)
    if seen >= int(os.environ.get(STEPS, "3")) or done > PATIENCE:
        return
    groups = stepper.param_groups if hasattr(stepper, "param_groups") else None
    if groups is None:
        groups = getattr(stepper.optimizer, "param_groups", [])
    # At a rate of 0, which schedules begin with, nothing shows.
    if not any(float(group.get("lr", 0.0)) > 0.0 for group in groups):
        return
    if _state.recorder is None:
        from dist_layerlr.audit.record import Recorder

        _state.recorder = Recorder(os.environ[FOLDER], _state.created, _state.stepped)
    _state.finish = _state.recorder.watch(stepper, first=seen == 0, fresh=fresh)
    _state.watched[stepper] = seen + 1


def _end(stepper: Any) -> None:
    if _state.busy or stepper not in _state.open:
        return
    # An inner step that raised never came here: what was opened in it is closed with this one.
    del _state.open[_state.open.index(stepper) :]
    if not _state.open and _state.finish is not None:
        finish, _state.finish = _state.finish, None
        _safely(finish)


def _safely(work: Callable[[], None]) -> None:
    """Do the audit's own work: a fault of it is written down and never reaches the script."""
    _state.busy = True
    try:
        work()
    except Exception:
        try:
            path = os.path.join(os.environ[FOLDER], f"fault-{os.getpid()}.txt")
            with open(path, "a", encoding="utf-8") as file:
                file.write(traceback.format_exc())
        except OSError:
            pass  # There is nobody left to tell, and the script must go on.
    finally:
        _state.busy = False
