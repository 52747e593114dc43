"""``stream`` and what it returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim import Optimizer

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.device import Backend, choose
from dist_layerlr.offload.engine import Engine
from dist_layerlr.offload.gradients import STAGING
from dist_layerlr.offload.mapped import map_frozen
from dist_layerlr.offload.masters import Piece, Unit, aligned, build, payload_bytes, slot_bytes
from dist_layerlr.offload.measure import predict_live
from dist_layerlr.offload.policy import AUTO, FILE, StreamPolicy
from dist_layerlr.offload.predict import Machine, Prediction, Workload, spread
from dist_layerlr.offload.residents import Residents, move
from dist_layerlr.offload.ring import Ring
from dist_layerlr.offload.stats import Stats, Traffic, UnitInfo
from dist_layerlr.offload.transfer import MEBIBYTE, Fetcher, Slot
from dist_layerlr.offload.units import Cut, cut
from dist_layerlr.offload.validate import GroupWatch, check_cuts, check_model

_DDP_IGNORED = "_ddp_params_and_buffers_to_ignore"
_AUTO_SHARE = 0.5
"""Part of the free device memory that ``resident_blocks='auto'`` fills; activations need the
rest."""
_STREAMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules of units that are streamed."""


class Handle:
    """A streamed model. Use it as a context manager, or call ``remove``."""

    def __init__(
        self,
        model: nn.Module,
        policy: StreamPolicy,
        backend: Backend,
        optimizer: Optimizer | None,
        cuts: list[Cut],
    ):
        self.policy, self.device = policy, backend.device
        self._model, self._backend, self._optimizer = model, backend, optimizer
        self._cuts = cuts
        self._resident = frozenset(spread(_resident_count(cuts, policy, backend), len(cuts)))
        self._watch = None if optimizer is None else GroupWatch(optimizer)
        self._residents = Residents(backend.device, optimizer)
        self._homes: list[tuple[Piece, torch.device]] = []
        self._engine: Engine | None = None
        self._undo: list[Callable[[], object]] = []
        self._reported = Traffic()
        self._claimed: list[nn.Module] = []
        self._grown = False
        """Whether some module registered a parameter since the last forward."""

    @property
    def units(self) -> tuple[UnitInfo, ...]:
        """All units, in forward order: as the names tell it, and as it was seen once a forward has
        run.
        """
        infos = [
            _info(c, self.policy, resident=i in self._resident) for i, c in enumerate(self._cuts)
        ]
        streamed = [u for u in infos if not u.resident]
        order = self._engine.ring.order if self._engine is not None else range(len(streamed))
        ordered = iter([streamed[i] for i in order])
        return tuple(u if u.resident else next(ordered) for u in infos)

    def stats(self) -> Stats:
        """Read the counters.

        Raises:
            OffloadError: after ``remove``.
        """
        engine = self._running()
        total = Traffic(
            h2d_bytes=engine.fetcher.nbytes,
            d2h_bytes=engine.sink.nbytes,
            fetches=engine.fetcher.fetches,
            stalls=engine.stalls,
        )
        recent, self._reported = total.since(self._reported), total
        return Stats(
            total=total, recent=recent, resident_peak=engine.ring.peak, slots=engine.ring.slots
        )

    def predict(
        self,
        tokens: int,
        *,
        checkpointing: bool = True,
        micro_steps: int = 1,
        sequence: int | None = None,
        dtype: torch.dtype | None = None,
        machine: Machine | None = None,
    ) -> Prediction:
        """Predict time and memory of one optimizer step: hidden or exposed, and the floor of its
        time.

        Args:
            tokens: of one microbatch.
            checkpointing: blocks are computed again in backward.
            micro_steps: microbatches per optimizer step.
            sequence: tokens that attend to each other; None: all.
            dtype: computed in, such as autocast's; None: that of the streamed weights.
            machine: speeds; None: they are measured now, which takes about a second.
        """
        work = Workload(
            tokens=tokens, sequence=sequence, checkpointing=checkpointing, micro_steps=micro_steps
        )
        return predict_live(
            self._model,
            self.units,
            self.streamed_names(),
            self.device,
            work,
            window=self.policy.prefetch_window,
            dtype=dtype,
            machine=machine,
        )

    def streamed_names(self) -> tuple[str, ...]:
        """Names, as in ``model.named_parameters()``, of streamed parameters."""
        return tuple(piece.name for piece, _ in self._homes)

    def exclude_from_ddp(self) -> None:
        """Make a later ``DistributedDataParallel(model)`` leave the streamed parameters alone.

        They are frozen and equal on all ranks, since each loaded them. Without this DDP would
        broadcast them at its start.
        """
        before: list[str] | None = self._model.__dict__.get(_DDP_IGNORED)
        self._undo.append(partial(_restore, self._model, before))
        setattr(self._model, _DDP_IGNORED, sorted({*(before or ()), *self.streamed_names()}))

    def check(self) -> None:
        """Compare the optimizer's groups with those at the start. Every forward does.

        Raises:
            OffloadError: their tensors are not the same objects.
        """
        if self._watch is not None:
            self._watch.check()

    def remove(self) -> None:
        """Give the model back as it was: plain tensors on their first devices, no hooks.

        Idempotent.

        Frozen weights that ``host_dtype`` stored in 8 bits come back rounded.
        """
        while self._undo:
            self._undo.pop()()
        try:
            if self._engine is not None:
                self._engine.close()
        finally:
            self._engine = None
            self._restore_model()

    def _restore_model(self) -> None:
        while self._homes:  # one at a time, so that memory is freed as it is copied
            piece, home = self._homes.pop()
            param = piece.weight.param
            if param.data_ptr() == piece.host.data_ptr():  # else the user gave it other data
                move(param, home, self._optimizer, piece.value().to(home))
        self._residents.release()
        for module in self._claimed:
            _STREAMED.discard(module)
        self._claimed.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refuse copies."""
        raise OffloadError("A streamed model cannot be copied. Call handle.remove() first.")

    def _running(self) -> Engine:
        if self._engine is None:
            raise OffloadError("This handle was removed. Stream the model again.")
        return self._engine

    def _start(self, files: str | Path | Iterable[str | Path] | None) -> None:
        """Do everything that changes the model; ``remove`` undoes it, also half done."""
        cuts = [c for i, c in enumerate(self._cuts) if i not in self._resident]
        mapped = map_frozen(cuts, files) if self.policy.host == FILE else None
        units = []
        for each in cuts:
            _STREAMED.add(each.module)
            self._claimed.append(each.module)
            units.append(build(each, mapped, self.policy.host_dtype))
            for piece in units[-1].pieces:
                param = piece.weight.param
                self._homes.append((piece, param.device))
                move(param, torch.device("cpu"), self._optimizer, piece.host)
        self._settle_rest()
        self._engine = self._make_engine(units)
        hooks = list(self._engine.hook(self._model, self._before_forward, self._after_forward))
        # That list of hooks is global: it must not keep the model alive.
        hooks.append(
            register_module_parameter_registration_hook(partial(_note_growth, weakref.ref(self)))
        )
        for piece in (p for u in units for p in u.pieces if p.codes is not None):
            owner: Any = piece.weight.owner
            hooks.append(owner.register_state_dict_post_hook(partial(_save_value, piece)))
            hooks.append(owner.register_load_state_dict_pre_hook(partial(_refuse_load, piece)))
        self._undo.extend(hook.remove for hook in hooks)

    def _make_engine(self, units: list[Unit]) -> Engine:
        count = min(self.policy.slots, len(units))
        size = aligned(max(u.device_bytes for u in units))
        dtypes = frozenset[torch.dtype]().union(*(u.dtypes for u in units))
        slots = []
        for _ in range(count):
            memory = self._backend.allocate(size)
            slots.append(
                Slot(memory, {dtype: memory.view(dtype) for dtype in dtypes}, self._backend.mark())
            )
        ring = Ring(units=len(units), slots=count, window=self.policy.prefetch_window)
        return Engine(
            units,
            ring,
            slots,
            Fetcher(self._backend, units, _master_pool(self.policy, self._cuts)),
            self._backend,
        )

    def _before_forward(self) -> None:
        if self._watch is not None:
            self._watch.begin()
        self._residents.check()
        if self._grown:
            self._settle_rest()

    def _after_forward(self) -> None:
        if self._watch is not None:
            self._watch.end()

    def _settle_rest(self) -> None:
        """What is not streamed, adapters that came later included, lives on the device."""
        self._grown = False
        self._residents.adopt(self._model, {id(piece.weight.param) for piece, _ in self._homes})


def stream(
    model: nn.Module,
    policy: StreamPolicy,
    *,
    optimizer: Optimizer | None = None,
    device: torch.device | str | None = None,
    files: str | Path | Iterable[str | Path] | None = None,
) -> Handle:
    """Stream ``model``'s units from host memory through a fixed ring of device slots.

    Parameters keep their identity, so groups, learning rates and optimizer state stay what they
    are. Training is bitwise equal to the resident model's. Between passes every streamed parameter,
    and its gradient, is a plain host tensor: an optimizer steps it on the CPU. Everything else of
    the model moves to the device.

    Args:
        model: unsharded, before DDP wraps it; adapters injected, ``requires_grad`` set, weights
            loaded.
        policy: what to stream.
        optimizer: when given, its groups are checked at every forward, and its state follows
            parameters that move.
        device: where compute happens; default: cuda if there is one, else cpu.
        files: checkpoint folder or safetensors files, for ``host="file"``.

    Returns:
        A handle; ``remove()``, or leaving its ``with`` block, undoes everything.

    Raises:
        OffloadError: the model cannot be streamed; it is unchanged.
    """
    return stream_on(choose(device), model, policy, optimizer=optimizer, files=files)


def stream_on(
    backend: Backend,
    model: nn.Module,
    policy: StreamPolicy,
    *,
    optimizer: Optimizer | None = None,
    files: str | Path | Iterable[str | Path] | None = None,
) -> Handle:
    """``stream`` on a device that the caller brings."""
    check_model(model)
    cuts = cut(model, policy)
    check_cuts(model, cuts, _STREAMED)
    _check_pool(policy, cuts)
    handle = Handle(model, policy, backend, optimizer, cuts)
    try:
        handle._start(files)
    except BaseException:
        handle.remove()
        raise
    return handle


def _info(cut: Cut, policy: StreamPolicy, *, resident: bool) -> UnitInfo:
    params = [w.param for w in cut.weights]
    return UnitInfo(
        name=cut.name,
        numel=cut.numel,
        streamed=0 if resident else sum(p.numel() for p in params),
        host_bytes=payload_bytes(cut, policy.host_dtype),
        device_bytes=slot_bytes(cut),
        grad_bytes=sum(p.numel() * p.element_size() for p in params if p.requires_grad),
        resident=resident,
    )


def _resident_count(cuts: list[Cut], policy: StreamPolicy, backend: Backend) -> int:
    """Units that stay on the device; at least one is streamed."""
    wanted = policy.resident_blocks
    if wanted == AUTO:
        free, size = backend.free_bytes(), max(slot_bytes(c) for c in cuts)
        wanted = 0 if free is None else int(_AUTO_SHARE * free) // size - policy.slots
    return max(0, min(int(wanted), len(cuts) - 1))


def _grad_staging(cuts: list[Cut]) -> int:
    trainable = (w.param for c in cuts for w in c.weights if w.param.requires_grad)
    return STAGING * max((p.numel() * p.element_size() for p in trainable), default=0)


def _master_pool(policy: StreamPolicy, cuts: list[Cut]) -> int | None:
    """Bytes that may be pinned for masters or their staging; None: no limit."""
    return (
        None
        if policy.pinned_pool_mb is None
        else policy.pinned_pool_mb * MEBIBYTE - _grad_staging(cuts)
    )


def _check_pool(policy: StreamPolicy, cuts: list[Cut]) -> None:
    pool = _master_pool(policy, cuts)
    largest = max(cuts, key=lambda c: payload_bytes(c, policy.host_dtype))
    needed = payload_bytes(largest, policy.host_dtype)
    if pool is not None and pool < needed:
        least = -(-(needed + _grad_staging(cuts)) // MEBIBYTE)
        raise OffloadError(
            f"Invalid pinned_pool_mb={policy.pinned_pool_mb}: smaller than what one unit"
            f" ({largest.name}) passes through. Must be >= {least}."
        )


def _note_growth(
    handle: weakref.ref[Handle], module: nn.Module, name: str, param: nn.Parameter
) -> None:
    live = handle()
    if live is not None:
        live._grown = True


def _restore(model: nn.Module, ignored: list[str] | None) -> None:
    if ignored is None:
        delattr(model, _DDP_IGNORED)
    else:
        setattr(model, _DDP_IGNORED, ignored)


def _save_value(
    piece: Piece, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """An encoded parameter has no values on the host; its state is what the device sees."""
    key = prefix + piece.weight.leaf
    if key in state_dict:
        state_dict[key] = piece.value()


def _refuse_load(
    piece: Piece, module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    if prefix + piece.weight.leaf in state_dict:
        raise OffloadError(
            f"Parameter {piece.name} is stored in 8 bits (host_dtype): it cannot be loaded while it"
            " is streamed. Call handle.remove() first."
        )
