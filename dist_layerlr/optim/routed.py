"""Several optimizers as one: each steps the names that the plan gives it.

Sharders, schedules and checkpoints see one optimizer. Groups are shared, not copied: what writes a
rate into a group of this one writes it into the optimizer that steps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from dist_layerlr.errors import ConfigError
from dist_layerlr.optim import fused
from dist_layerlr.optim.any_whole import AnyWhole
from dist_layerlr.optim.groups import AVERAGE, OPTIMIZER, WEIGHT_DECAY
from dist_layerlr.optim.whole import (
    MOMENTUM,
    MakeOptimizer,
    MuonSlices,
    NeedsWhole,
    make_template,
)
from dist_layerlr.plan.entries import Plan
from dist_layerlr.plan.optimizers import OPTIMIZERS_BLOCK as BLOCK
from dist_layerlr.sharders.base import ParamGroup

MakeOptimizers = Mapping[str, MakeOptimizer]


class Routed(Optimizer):
    """Optimizers by the plan's names for them."""

    def __init__(self, parts: Mapping[str, Optimizer], makes: MakeOptimizers):
        """Show the groups of all ``parts`` as one optimizer's; ``makes`` have built them."""
        self.parts = dict(parts)
        self.makes = makes
        groups = [group for part in parts.values() for group in part.param_groups]
        # Without defaults: they would be written into groups that lack such a setting.
        super().__init__(groups, {})
        # The groups themselves, whatever the constructor has made of the list.
        self.param_groups = groups
        self._fused = dict(zip(self.parts, map(fused.handles, self.parts.values()), strict=True))

    @property
    def state(self) -> Any:
        """One mapping, that of all parts: each tensor is stepped by one of them."""
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state = state
        for part in self.parts.values():
            part.state = state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every part, in the same order on all ranks: some exchange what they need."""
        for name, part in self.parts.items():
            # The kernel is called directly, as for one optimizer: see fused.py.
            if self._fused[name]:
                fused.step(part)
            else:
                part.step()

    def kind_of(self, label: str) -> str:
        """Class of the optimizer that the plan calls ``label``."""
        part = self.parts[label]
        return part.kind if isinstance(part, NeedsWhole) else type(part).__name__

    def decay_of(self, label: str) -> float:
        """Weight decay where the plan leaves it to the optimizer."""
        return float(self.parts[label].defaults.get(WEIGHT_DECAY, 0.0))

    def takes(self, label: str, key: str) -> bool:
        """Whether an entry of a tensor's state belongs to this part.

        Names of several optimizers may share one flat tensor, hence one state.
        """
        part = self.parts[label]
        if key == AVERAGE:
            return True
        if isinstance(part, NeedsWhole):
            return key in part.state_keys
        return key != MOMENTUM


def router(plan: Plan, makes: MakeOptimizers, whole: Set[str] = frozenset()) -> MakeOptimizer:
    """A maker of them all on the plan's groups.

    Args:
        plan: says which groups are whose.
        makes: {optimizer: groups -> optimizer}.
        whole: those that a trial has shown to need whole tensors; torch's Muon is known to.
    """
    # No closure: an optimizer may be pickled.
    return partial(_route, plan, makes, whole)


def rerouted(make: MakeOptimizer, plan: Plan) -> MakeOptimizer:
    """What ``router`` has made, for another plan of the same names; any other maker as it is."""
    if isinstance(make, partial) and make.func is _route:
        return partial(_route, plan, *make.args[1:])
    return make


def _route(
    plan: Plan, makes: MakeOptimizers, whole: Set[str], groups: list[ParamGroup]
) -> Optimizer:
    parts: dict[str, Optimizer] = {}
    for label, own in makes.items():
        mine = [group for group in groups if group[OPTIMIZER] == label]
        if not takes_matrices(plan, label):
            parts[label] = own(mine)
        elif type(make_template(plan, own, mine)) is torch.optim.Muon:
            # A subclass may do more in its step: it gets whole matrices, and steps them itself.
            parts[label] = MuonSlices(plan, own, mine)
        else:
            parts[label] = AnyWhole(plan, own, mine) if label in whole else own(mine)
    return Routed(parts, makes)


def takes_matrices(plan: Plan, label: str) -> bool:
    """Whether all that an optimizer takes are matrices, so that it may get them whole."""
    given = plan.config.optimizers
    return given is not None and label in given.rules and given.rules[label].matrices


def check_makes(plan: Plan, makes: MakeOptimizers) -> None:
    """Refuse makers that are not those of the plan.

    Raises:
        ConfigError: names differ, or an optimizer takes no parameter.
    """
    given = plan.config.optimizers
    if given is None:
        raise ConfigError(
            f"Invalid make={sorted(makes)}: the plan's config names no optimizers. Add a block such"
            f' as "{BLOCK}": {{"muon": {{}}, "adamw": "rest"}} to it, or give one function.'
        )
    if set(makes) != set(given.names):
        raise ConfigError(
            f"Invalid make={sorted(makes)}: the config's {BLOCK!r} names {sorted(given.names)}."
            " Give one function for each of them."
        )
    taken = {entry.optimizer for entry in plan.entries.values()}
    for name in given.names:
        if name not in taken:
            raise ConfigError(
                f"Invalid {BLOCK}.{name}: it takes no trainable parameter of this model. Remove it,"
                " or list components that the model has (dist-layerlr explain says why a name goes"
                " elsewhere)."
            )


def parts_of(optimizer: Any) -> Routed | None:
    """The several optimizers inside a segmented one; None: there is one for all."""
    inner = getattr(optimizer, "inner", optimizer)
    return inner if isinstance(inner, Routed) else None
