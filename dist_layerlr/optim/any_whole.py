"""Any optimizer on whole tensors, which it keeps on their owner's rank: SOAP, Adafactor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_layerlr.optim.exchange import Exchange, Schedule
from dist_layerlr.optim.groups import LR, NAME, WEIGHT_DECAY
from dist_layerlr.optim.whole import Located, MakeOptimizer, NeedsWhole
from dist_layerlr.plan.entries import Plan
from dist_layerlr.ranks import alike, transport_device
from dist_layerlr.sharders.base import ParamGroup


class AnyWhole(NeedsWhole):
    """Any optimizer, on whole tensors that it keeps on their owner's rank."""

    fixed_owners = True

    def __init__(self, plan: Plan, make: MakeOptimizer, groups: list[ParamGroup]):
        super().__init__(plan, make, groups)
        self._whole: dict[str, nn.Parameter] = {}
        self._on_whole: Optimizer | None = None

    def _round(
        self,
        exchange: Exchange,
        schedule: Schedule,
        stepped: Mapping[str, Sequence[Located]],
        group_of: Mapping[int, ParamGroup],
    ) -> None:
        weights: dict[str, list[tuple[int, Tensor]]] = {}
        gradients: dict[str, list[tuple[int, Tensor]]] = {}
        for name in schedule.sizes:
            for piece in stepped.get(name, ()):
                assert piece.view.grad is not None
                value, slope = piece.of(piece.view.detach()), piece.of(piece.view.grad)
                weights.setdefault(name, []).append((piece.start, _sendable(value)))
                gradients.setdefault(name, []).append((piece.start, _sendable(slope)))
        # Two collectives on one schedule, in this order on every rank: weight and gradient meet on
        # the owner. float32 holds bf16 and fp16 exactly.
        here = exchange.gather(schedule, weights, torch.float32)
        slopes = exchange.gather(schedule, gradients, torch.float32)
        step = partial(self._step_whole, here, slopes)
        # A decomposition may fail on the rank that owns the matrix, while the others wait for it.
        alike(step) if len(exchange.table) > 1 else step()
        result = {name: self._whole[name].detach().reshape(-1) for name in here}
        for segment, values in exchange.give_back(schedule, result, torch.float32):
            for piece in stepped.get(segment.name, ()):
                if (piece.start, piece.numel) == (segment.start, segment.numel):
                    weight = piece.of(piece.view.detach())
                    weight.copy_(values.view(weight.shape))

    def _step_whole(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        known = len(self._whole)
        for name, values in weights.items():
            shape = self.entries[name].shape
            if name not in self._whole:
                self._whole[name] = nn.Parameter(torch.empty(shape, device=values.device))
            # The weight may have been loaded, or written by somebody else, since the last step.
            self._whole[name].data.copy_(values.view(shape))
            # A copy: many optimizers add decay into it, and here it may be the live gradient.
            self._whole[name].grad = gradients[name].clone().view(shape)
        if len(self._whole) > known:
            self._on_whole = self._built_anew()
        if self._on_whole is None:
            return
        # The schedule writes the groups that are shown: those of the whole follow at each step.
        shown = {group[NAME]: group for group in self.param_groups}
        for group in self._on_whole.param_groups:
            for key in group.keys() & {LR, WEIGHT_DECAY}:
                group[key] = shown[group[NAME]][key]
        self._on_whole.step()
        for param in self._whole.values():
            # Kept, the whole gradients would take up memory until the next step.
            param.grad = None

    def _built_anew(self) -> Optimizer:
        """Build the optimizer for all tensors so far: groups are fixed when one is built."""
        found = self.make(self._groups())
        if self._on_whole is None:
            return found
        # A round, or a gradient that comes late, brings further tensors; the others keep what they
        # have gathered, and their groups the counts that some optimizers hold there.
        found.state.update(self._on_whole.state)
        held = {group[NAME]: group for group in self._on_whole.param_groups}
        for group in found.param_groups:
            before = held.get(group[NAME], {})
            group.update({key: value for key, value in before.items() if key != "params"})
        return found

    def _groups(self) -> list[ParamGroup]:
        found: list[ParamGroup] = []
        for group in self.param_groups:
            mine = [p for n, p in self._whole.items() if self._groups_of[n] == group[NAME]]
            if mine:
                found.append({**group, "params": mine})
        return found


def _sendable(value: Tensor) -> Tensor:
    return value.detach().to(torch.float32).reshape(-1).to(transport_device())
