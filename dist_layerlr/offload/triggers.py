"""What torch calls while a streamed model runs forward: for the model, its units, their modules.

The hooks fetch nothing by themselves: they tell the engine which unit is needed, and when a pass
begins and ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.engine import Engine
from dist_layerlr.offload.internals import graph_task, hook_entry
from dist_layerlr.offload.masters import Unit
from dist_layerlr.offload.validate import check_autocast


class Removable(Protocol):
    """A registered hook, or several."""

    def remove(self) -> None:
        """Take it off."""
        ...


class OwnerHooks:
    """Hooks of the modules inside one unit that own its weights.

    They are for a module that is called without its unit: by a block that checkpoints a part of
    itself, when that part is computed again, or by the caller. While the unit's own forward runs
    there is nothing for them to do, and calling them would cost more than everything else; so they
    *rest* then.
    """

    def __init__(self, owners: Iterable[nn.Module], before: Callable[..., None]):
        handles = []
        for owner in owners:
            handles.append(owner.register_forward_pre_hook(before, prepend=True))
        self._handles = handles
        self._entries = list(map(hook_entry, handles))
        self._resting = False

    def rest(self) -> None:
        """Take the hooks off for a while."""
        self._resting = True
        for hooks, key, _ in self._entries:
            hooks.pop(key, None)

    def wake(self) -> None:
        """Put them back."""
        if not self._resting:
            return
        self._resting = False
        for hooks, key, hook in self._entries:
            hooks[key] = hook
            if len(hooks) > 1:
                # In front of the caller's own, which may read weights.
                hooks.move_to_end(key, last=False)

    def remove(self) -> None:
        """Take the hooks off for ever."""
        for handle in self._handles:
            handle.remove()
        self._entries, self._resting = [], False


class Triggers:
    """The hooks of one streamed model."""

    def __init__(self, engine: Engine):
        """Register nothing yet; ``engine`` is told what is needed."""
        self._engine = engine
        self._saved = engine.saved
        self._thread = 0
        """Which thread runs the model's forward, or ran the last one."""
        self._owners: list[OwnerHooks] = []
        """By unit."""

    def register(
        self, model: nn.Module, before: Callable[[], None], after: Callable[[], None]
    ) -> Iterator[Removable]:
        """Register all hooks.

        Args:
            model: whose units are streamed. Nothing here refers to it, nor do hooks of its units: a
                graph that refers to one of them must not keep the model alive.
            before: runs in front of each forward of the model.
            after: runs behind it.
        """
        engine = self._engine
        # In front of the caller's own pre-hooks, which may read weights; with always_call behind
        # the forward, so that an exception in it leaves the parameters on the host, too.
        self._saved.reach.watch(model)
        yield model.register_forward_pre_hook(partial(self._begin_forward, before), prepend=True)
        yield model.register_forward_hook(partial(self._end_forward, after), always_call=True)
        for index, unit in enumerate(engine.units):
            module = unit.module
            yield module.register_forward_pre_hook(partial(self._enter_unit, index), prepend=True)
            yield module.register_forward_hook(self._leave_unit, always_call=True)
            self._owners.append(OwnerHooks(_owners(unit), partial(self._enter_owner, index)))
            yield self._owners[-1]
        engine.on_backward(self._wake_running)
        # torch keeps this hook in a global list, which must not keep the model alive.
        yield register_optimizer_step_pre_hook(partial(_announce_step, weakref.ref(engine)))

    def _begin_forward(self, before: Callable[[], None], module: nn.Module, args: Any) -> None:
        if graph_task() != -1:
            return
        thread = threading.get_ident()
        if self._engine.in_forward and thread != self._thread:
            raise OffloadError(
                "Two threads run the streamed model at once, which has one set of weights on"
                " the device. Give each call its turn (a lock)."
            )
        self._engine.refuse_unsettled()
        self._thread = thread
        # Leave units whose forward was interrupted: torch does not call forward hooks after a
        # KeyboardInterrupt, so nothing else would.
        while self._saved.running is not None:
            self._owners[self._saved.leave()].wake()
        self._engine.check_rest()
        before()
        self._engine.begin_forward()

    def _end_forward(
        self, after: Callable[[], None], module: nn.Module, args: Any, output: Any
    ) -> None:
        # The second: a refused call of another thread must not end the forward that runs.
        if graph_task() != -1 or threading.get_ident() != self._thread:
            return
        self._engine.end_forward()
        after()

    def _enter_unit(self, index: int, module: nn.Module, args: Any) -> None:
        # A hook that torch.compile traces cannot fetch: copies and events are no graph's business.
        if torch.compiler.is_compiling():
            return
        # First, because _leave_unit runs even if what follows raises.
        self._saved.enter(index)
        engine = self._engine
        unit = engine.units[index]
        check_autocast(engine.device_type, unit.name, unit.trained)
        engine.need(index)
        self._owners[index].rest()
        if torch.is_grad_enabled():
            self._saved.record()

    def _leave_unit(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._owners[self._saved.leave()].wake()
        # A unit that was called inside of another one's forward has taken its place.
        self._wake_running()
        self._end_if_alone()

    def _enter_owner(self, index: int, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._saved.running is None and self._alone:
            # torch looks for hooks behind a forward when it is over, so this one is in time; with
            # always_call it runs even if what follows raises.
            handle: RemovableHandle

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                handle.remove()
                self._end_if_alone()

            handle = module.register_forward_hook(leave, always_call=True)
        self._engine.need(index)

    @property
    def _alone(self) -> bool:
        """Whether neither the model runs nor a backward pass: nobody else ends this pass."""
        return graph_task() == -1 and not self._engine.in_forward

    def _end_if_alone(self) -> None:
        if self._alone:
            self._engine.end_without_model()

    def _wake_running(self) -> None:
        """Another unit takes the place of the one whose forward runs: have that one fetched anew.

        By the next of its modules that is called.
        """
        running = self._saved.running
        if running is not None:
            self._owners[running].wake()


def _owners(unit: Unit) -> list[nn.Module]:
    """The modules inside a unit that own its weights."""
    owners = {id(m.weight.owner): m.weight.owner for m in unit.masters}
    owners.pop(id(unit.module), None)  # has the unit's own hooks
    return list(owners.values())


def _announce_step(
    engine: weakref.ref[Engine], optimizer: Optimizer, args: Any, kwargs: Any
) -> None:
    live = engine()
    if live is not None:
        live.before_step(optimizer)
