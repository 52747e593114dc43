"""An exponential moving average of the weights that an optimizer steps, on the shards themselves.

Each rank averages the tensors that it steps, fp32 masters where there are, so no collective is
needed and no element is held twice. To a checkpoint the average is one more entry of the
optimizer's state: it is saved by name, and loaded into any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dist_layerlr.fields import number
from dist_layerlr.optim.groups import AVERAGE
from dist_layerlr.optim.readback import live_pieces
from dist_layerlr.sharders import sharder_of
from dist_layerlr.sharders.base import local

_DECAY = number(0.0, 1.0)


class WeightAverage:
    """Averages what an optimizer steps, beginning with the weights that are there now."""

    def __init__(
        self, model: nn.Module, optimizer: Any = None, *, device: torch.device | None = None
    ):
        """Bind to a wrapped model and its optimizer, and copy the weights.

        Args:
            model: As it is trained.
            optimizer: The one that is stepped; a DeepSpeed engine brings its own.
            device: Where the average is; None: beside each weight. Host memory costs the way of the
                weights at every update.
        """
        self._sharder, self._given, self._device = sharder_of(model), optimizer, device
        self._owners: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._look()
        for owner in self._owners:
            self._averages.append(self._copy(owner))

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Make it ``decay`` x average + (1 - decay) x weights. Call it after a step.

        Raises:
            ConfigError: a decay outside [0, 1].
        """
        merge: Any = get_ema_multi_avg_fn(_DECAY("decay", decay))  # type: ignore[no-untyped-call]
        now = [
            local(owner).detach().to(average.device, average.dtype).reshape(average.shape)
            for owner, average in zip(self._owners, self._averages, strict=True)
        ]
        if now:
            merge(self._averages, now, 0)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the model hold the average while inside; afterwards its weights, to the last bit.

        Collective. Costs the memory of the weights that this rank steps.
        """
        self._look()
        kept = [local(owner).detach().clone() for owner in self._owners]
        self._write(self._averages)
        try:
            yield
        finally:
            # A forward inside may have gathered averages in the place of the tensors written to.
            self._sharder.reshard()
            self._write(kept)

    @contextmanager
    def in_state(self) -> Iterator[None]:
        """Show the average as state of the optimizer while inside, to be saved or loaded.

        No longer than that: optimizers make their state in a first step, which they know by an
        empty one. Where a load finds no average, it begins anew with the weights.
        """
        state = self._look()
        for owner, average in zip(self._owners, self._averages, strict=True):
            state[owner][AVERAGE] = average
        try:
            yield
        finally:
            for place, owner in enumerate(self._owners):
                found = state[owner].pop(AVERAGE, None)
                if found is None:
                    self._averages[place].copy_(local(owner).detach())
                else:
                    self._averages[place] = found

    def _look(self) -> Any:
        """List what is stepped. Returns the optimizer's state by tensor."""
        # A unit that is gathered shows tensors that nobody steps.
        self._sharder.reshard()
        found = live_pieces(self._sharder, self._given)
        self._owners = list({id(piece.owner): piece.owner for piece in found.pieces}.values())
        return found.optimizer.state

    def _copy(self, owner: Tensor) -> Tensor:
        here = local(owner).detach()
        # Contiguous, as a checkpoint takes its elements in order; fp32, because the last bits of a
        # weight are what an average collects.
        copy = torch.empty(here.shape, dtype=torch.float32, device=self._device or here.device)
        return copy.copy_(here)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for owner, value in zip(self._owners, values, strict=True):
            local(owner).detach().copy_(value.view(local(owner).shape))
        self._sharder.refresh()
