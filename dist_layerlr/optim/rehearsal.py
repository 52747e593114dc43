"""A copy of a live scheduler on a scratch optimizer, which can be stepped through a run unseen.

``copy.deepcopy`` would do for most schedulers, and for some it would copy the model: a function of
a scheduler may be a method of the trainer. Here only what a scheduler owns is copied (itself, the
schedulers and functions inside it, numbers and containers of them); optimizers become scratch ones,
and everything else is shared.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.sharders.base import is_optimizer, live_optimizer

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType)
_SHARED_FROM = 10_000
"""Elements from which a container is somebody's data, not a scheduler's setting."""
_DATA_DEPTH = 3
_COUNTERS = frozenset(
    ("last_epoch", "_step_count", "last_batch_iteration", "num_bad_epochs", "cooldown_counter")
)
"""Where a scheduler stands says nothing about how long its run is."""
_LONGEST = 10_000_000


class StandIn(Optimizer):
    """An optimizer with given groups on parameters of one element; its steps do nothing."""

    step_was_skipped = False
    """Accelerate's schedulers ask the optimizer for it."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]):
        """Take over the settings of ``groups``: rates, betas, names ..., not their parameters."""
        params = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in groups]
        super().__init__(params, dict(defaults))
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            for key, value in theirs.items():
                if key != "params":
                    mine[key] = _detached(value)
        # What torch's schedulers look at to warn of a scheduler that is stepped first.
        self._opt_called = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


# Torch's schedulers replace ``optimizer.step`` unless it says that one of them has done so.
StandIn.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


class _Synced:
    """Stands for Accelerate's gradient state at an optimizer step."""

    sync_gradients = True
    adjust_scheduler = False


class Copier:
    """Copies one scheduler, and notes the numbers that it meets in its settings."""

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        """Whole numbers from 2: any of them may be the length of the run."""
        self.rates: list[tuple[str, float]] = []
        """(setting, value) of floats, by the name of the attribute, keyword or variable."""
        self._memo: dict[int, Any] = {}
        # An id names an object only as long as the object lives.
        self._alive: list[Any] = []
        self._scratch: dict[int, StandIn] = {}

    def copy(self, value: Any, name: str = "") -> Any:
        """The copy of ``value``, which its owner calls ``name``."""
        if isinstance(value, _PLAIN):
            self._note(name, value)
            return value
        if name == "gradient_state":
            return _Synced()
        if id(value) not in self._memo:
            self._alive.append(value)
            made = self._made(value, name)
            # Rules that may meet themselves again have entered their result already.
            self._memo.setdefault(id(value), made)
        return self._memo[id(value)]

    def stand_in_of(self, optimizer: Any) -> StandIn:
        """The scratch optimizer that stands for ``optimizer`` and every wrapper of it."""
        # Wrappers hand out the list of the optimizer inside them.
        groups = optimizer.param_groups
        if id(groups) not in self._scratch:
            self._alive.append(groups)
            defaults = getattr(live_optimizer(optimizer), "defaults", None)
            self._scratch[id(groups)] = StandIn(groups, defaults or {})
        return self._scratch[id(groups)]

    def _made(self, value: Any, name: str) -> Any:
        if is_optimizer(value):
            return self.stand_in_of(value)
        if isinstance(value, Tensor):
            return _detached(value)
        if isinstance(value, (list, tuple, dict, set, frozenset, deque)):
            return value if len(value) > _SHARED_FROM else self._container(value, name)
        if isinstance(value, functools.partial):
            kept = self.copy(dict(value.keywords))
            return functools.partial(self.copy(value.func), *map(self.copy, value.args), **kept)
        if isinstance(value, types.MethodType):
            self._note_code(value.__func__)
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        return self._object(value) if _is_owned(value) else value

    def _container(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            found = self._memo[id(value)] = copy.copy(value)  # a Counter stays one
            for key, held in value.items():
                self._note("", key)
                found[key] = self.copy(held, key if isinstance(key, str) else name)
            return found
        if isinstance(value, (list, tuple)):
            filled: list[Any] = []
            if isinstance(value, list):
                self._memo[id(value)] = filled
            for held in value:
                filled.append(self.copy(held, name))
            if isinstance(value, list):
                return filled
            return type(value)(*filled) if hasattr(value, "_fields") else tuple(filled)
        for held in value:
            self._note(name, held)
        return copy.copy(value)

    def _function(self, function: types.FunctionType) -> Any:
        """The function on copies of the variables that it closes over."""
        self._note_code(function)
        if not function.__closure__:
            return function
        cells = [types.CellType() for _ in function.__closure__]
        found = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(cells),
        )
        found.__kwdefaults__ = function.__kwdefaults__
        # A function may close over itself.
        self._memo[id(function)] = found
        found.__dict__.update(function.__dict__)
        names = function.__code__.co_freevars
        for name, mine, theirs in zip(names, cells, function.__closure__, strict=True):
            try:
                held = theirs.cell_contents
            except ValueError:  # empty until its variable is assigned
                continue
            mine.cell_contents = self.copy(held, name)
        return found

    def _object(self, value: Any) -> Any:
        found = self._memo[id(value)] = object.__new__(type(value))
        for key, held in vars(value).items():
            found.__dict__[key] = self.copy(held, key)
        return found

    def _note(self, name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or name in _COUNTERS:
            return
        if isinstance(value, float):
            self.rates.append((name, value))
        if 2 <= value <= _LONGEST and value == int(value):
            self.numbers.add(int(value))

    def _note_code(self, function: Any) -> None:
        """Numbers that stand in a function's text, or in the globals that it names."""
        code = getattr(function, "__code__", None)
        if code is None:
            return
        for value in code.co_consts:
            self._note("", value)
        for name in code.co_names:
            self._note(name, function.__globals__.get(name))


def is_scheduler(value: Any) -> bool:
    """Whether this is stepped, and neither a module (an engine) nor an optimizer."""
    return (
        callable(getattr(value, "step", None))
        and not isinstance(value, (type, nn.Module))
        and not is_optimizer(value)
    )


def nested(scheduler: Any) -> list[Any]:
    """The schedulers inside a scheduler, whatever their depth: alone or in lists."""
    found: dict[int, Any] = {id(scheduler): scheduler}
    todo = [scheduler]
    while todo:
        for held in getattr(todo.pop(), "__dict__", {}).values():
            for value in held if isinstance(held, (list, tuple)) else [held]:
                if is_scheduler(value) and id(value) not in found:
                    found[id(value)] = value
                    todo.append(value)
    return list(found.values())[1:]


def optimizer_of(scheduler: Any) -> Any:
    """The optimizer, or wrapper of one, whose rates a scheduler writes; None: none is to be seen.

    Every scheduler that is known keeps it as ``optimizer``, ``optimizers``, or in what it wraps.
    """
    for part in (scheduler, *nested(scheduler)):
        several = getattr(part, "optimizers", ())
        named = [getattr(part, "optimizer", None), *_listed(several)]
        for value in (*named, *getattr(part, "__dict__", {}).values()):
            if is_optimizer(value):
                return value
    return None


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _is_owned(value: Any) -> bool:
    """Whether an object is a scheduler or a small thing of numbers that one may use up."""
    # A copy of an object with a finaliser would close what the original still uses.
    if isinstance(value, nn.Module) or hasattr(type(value), "__del__"):
        return False
    # A class that makes its instances itself (an Enum, a subclass of int) has its reasons.
    if not hasattr(value, "__dict__") or any(
        "__new__" in vars(c) for c in type(value).__mro__[:-1]
    ):
        return False
    return is_scheduler(value) or _is_data(vars(value), _DATA_DEPTH)


def _is_data(value: Any, depth: int) -> bool:
    if isinstance(value, (*_PLAIN, types.FunctionType)) or is_optimizer(value):
        return True
    if depth == 0:
        return False
    if isinstance(value, Tensor):
        return value.numel() <= 1
    if isinstance(value, (dict, list, tuple, set, frozenset, deque)):
        several = value.values() if isinstance(value, dict) else value
        return all(_is_data(held, depth - 1) for held in several)
    return False


def _detached(value: Any) -> Any:
    """A setting that may be written to: rates may be tensors of one element."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.numel() <= 1 else value
    return copy.copy(value) if isinstance(value, (list, dict)) else value
