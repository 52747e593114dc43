"""An exponential moving average of the weights that an optimizer steps, on the shards themselves.

Each rank averages the tensors that it steps, fp32 masters where there are, so no collective is
needed and no element is held twice. To a checkpoint the average is one more entry of the
optimizer's state: it is saved by name, and loaded into any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
_Place = tuple[int, str, int]
"""(offset, name, first element) of the first run in a tensor that is stepped."""


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
        self._owners: dict[_Place, Tensor] = {}
        self._averages: dict[_Place, Tensor] = {}
        self._look()
        for place, owner in self._owners.items():
            self._averages[place] = self._copy(owner)

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Make it ``decay`` x average + (1 - decay) x weights. Call it after a step.

        Raises:
            ConfigError: a decay outside [0, 1].
        """
        merge: Any = get_ema_multi_avg_fn(_DECAY("decay", decay))  # type: ignore[no-untyped-call]
        now: list[Tensor] = []
        for place, average in self._averages.items():
            weights = local(self._owners[place]).detach()
            now.append(weights.to(average.device, average.dtype).reshape(average.shape))
        if now:
            merge(list(self._averages.values()), now, 0)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Have the model hold the average while inside; afterwards its weights, to the last bit.

        Collective. Costs the memory of the weights that this rank steps.
        """
        self._look()
        kept = {place: local(owner).detach().clone() for place, owner in self._owners.items()}
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
        for place, average in self._averages.items():
            state[self._owners[place]][AVERAGE] = average
        try:
            yield
        finally:
            for place, owner in self._owners.items():
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
        first: dict[int, tuple[int, str, int]] = {}
        for piece in found.pieces:
            known = first.setdefault(id(piece.owner), (piece.offset, piece.name, piece.start))
            first[id(piece.owner)] = min(known, (piece.offset, piece.name, piece.start))
        # By what a tensor holds, not by its turn: groups that part change the order.
        self._owners = {first[id(piece.owner)]: piece.owner for piece in found.pieces}
        return found.optimizer.state

    def _copy(self, owner: Tensor) -> Tensor:
        here = local(owner).detach()
        # Contiguous, as a checkpoint takes its elements in order; fp32, because the last bits of a
        # weight are what an average collects.
        copy = torch.empty(here.shape, dtype=torch.float32, device=self._device or here.device)
        return copy.copy_(here)

    @torch.no_grad()
    def _write(self, values: Mapping[_Place, Tensor]) -> None:
        for place, value in values.items():
            here = local(self._owners[place])
            here.detach().copy_(value.view(here.shape))
        self._sharder.refresh()
