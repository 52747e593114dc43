"""``stream``, which makes a model streamed, and the handle that it returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.optim import Optimizer

from dist_layerlr.errors import OffloadError
from dist_layerlr.offload.budget import check_pool, master_pool_bytes, resident_count, unit_info
from dist_layerlr.offload.device import Backend, choose
from dist_layerlr.offload.encoded import state_dict_hooks
from dist_layerlr.offload.engine import Engine
from dist_layerlr.offload.internals import ddp_ignored, set_ddp_ignored
from dist_layerlr.offload.mapped import map_frozen
from dist_layerlr.offload.masters import Master, Unit, aligned, build, payload_bytes
from dist_layerlr.offload.measure import predict_live
from dist_layerlr.offload.meter import DOWNLOAD, UPLOAD, WAIT
from dist_layerlr.offload.policy import FILE, StreamPolicy
from dist_layerlr.offload.predict import spread
from dist_layerlr.offload.prediction import Machine, Prediction, Workload
from dist_layerlr.offload.residents import Residents, move
from dist_layerlr.offload.ring import Ring
from dist_layerlr.offload.stats import Stats, Traffic, UnitInfo
from dist_layerlr.offload.trace import check_path, write_trace
from dist_layerlr.offload.transfer import Fetcher, Slot
from dist_layerlr.offload.triggers import Removable, Triggers
from dist_layerlr.offload.units import UnitSpec, find_units
from dist_layerlr.offload.validate import GroupWatch, check_model, check_units

_STREAMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules of units that are streamed now, of all models; weak, so that a model can be dropped."""


class Handle:
    """A streamed model. Use it as a context manager, or call ``remove``."""

    def __init__(
        self,
        model: nn.Module,
        policy: StreamPolicy,
        backend: Backend,
        optimizer: Optimizer | None,
        specs: list[UnitSpec],
    ):
        self.policy, self.device = policy, backend.device
        self._model, self._backend, self._optimizer = model, backend, optimizer
        self._specs = specs
        self._resident = frozenset(spread(resident_count(specs, policy, backend), len(specs)))
        self._watch = None if optimizer is None else GroupWatch(optimizer)
        self._residents = Residents(backend.device, optimizer)
        self._homes: list[tuple[Master, torch.device]] = []
        """Every streamed parameter's master, and the device that the parameter came from."""
        self._engine: Engine | None = None
        self._undo: list[Callable[[], object]] = []
        """What ``remove`` calls, last first."""
        self._reported = Traffic()
        self._claimed: list[nn.Module] = []
        """The modules that this handle added to those that are streamed."""
        self._grown = False
        """Whether some module registered a parameter since the last forward."""

    @property
    def units(self) -> tuple[UnitInfo, ...]:
        """All units in forward order: as the names tell it, then as the first forward showed it."""
        infos: list[UnitInfo] = []
        places: list[int] = []
        for i, spec in enumerate(self._specs):
            infos.append(unit_info(spec, self.policy, resident=i in self._resident))
            if i not in self._resident:
                places.append(i)
        if self._engine is None:
            return tuple(infos)
        # The ring numbers streamed units only. They take each other's places in the order that it
        # saw; resident units stay where their names put them.
        ordered = list(infos)
        for place, unit in zip(places, self._engine.copies.ring.order, strict=True):
            ordered[place] = infos[places[unit]]
        return tuple(ordered)

    def stats(self) -> Stats:
        """Read the counters.

        Raises:
            OffloadError: after ``remove``.
        """
        engine = self._running_engine()
        copies, meter = engine.copies, engine.copies.fetcher.meter
        meter.read()
        total = Traffic(
            h2d_bytes=copies.fetcher.nbytes,
            d2h_bytes=engine.sink.nbytes,
            fetches=copies.fetcher.fetches,
            stalls=meter.counts[WAIT],
            stall_s=meter.seconds[WAIT],
            h2d_s=meter.seconds[UPLOAD],
            d2h_s=meter.seconds[DOWNLOAD],
        )
        recent, self._reported = total.since(self._reported), total
        return Stats(
            total=total, recent=recent, resident_peak=copies.ring.peak, slots=copies.ring.slots
        )

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Write what happens inside the block as a trace for Chrome or ui.perfetto.dev.

        It shows compute, waits and copies each way, per unit. The device is idle when it begins and
        ends. On CUDA units are also ranges of NVTX, for NVIDIA's profilers.

        Args:
            path: a .json file.

        Raises:
            OffloadError: after ``remove``, or the file cannot be written.
        """
        check_path(Path(path))
        with self._running_engine().copies.fetcher.meter.record() as timed:
            yield
        write_trace(Path(path), timed)

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
        """Predict one optimizer step: its memory, its least time, and whether copies are hidden.

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
        return tuple(master.name for master, _ in self._homes)

    def exclude_from_ddp(self) -> None:
        """Make a later ``DistributedDataParallel(model)`` leave the streamed parameters alone.

        They are frozen and equal on all ranks, since each loaded them. Without this DDP would
        broadcast them at its start.
        """
        before = ddp_ignored(self._model)
        self._undo.append(partial(set_ddp_ignored, self._model, before))
        set_ddp_ignored(self._model, sorted({*(before or ()), *self.streamed_names()}))

    def check(self) -> None:
        """Compare the optimizer's groups with those at the start. Every forward does.

        Raises:
            OffloadError: their tensors are not the same objects.
        """
        if self._watch is not None:
            self._watch.check()

    def accept_groups(self) -> None:
        """Take the optimizer's groups as they are now, after they were parted on purpose."""
        if self._optimizer is not None:
            self._watch = GroupWatch(self._optimizer)

    def recover(self) -> None:
        """Settle a backward pass that failed: call it where its exception is caught.

        Streamed weights have then the gradients that they would have without streaming: what had
        arrived, added to what was there. On the CPU this has happened already; a device's autograd
        thread may be late, and the next forward is an error until this was called. Idempotent.

        Raises:
            OffloadError: after ``remove``.
        """
        self._running_engine().finish_backward()

    def remove(self) -> None:
        """Give the model back as it was: plain tensors on their first devices, no hooks.

        Frozen weights that ``host_dtype`` stored in 8 bits come back rounded. Idempotent.
        """
        # The hooks go first, so that nothing that follows triggers a fetch. Then the engine ends
        # copies and unlocks memory, and only then do parameters leave their masters.
        while self._undo:
            self._undo.pop()()
        try:
            if self._engine is not None:
                self._engine.close()
        finally:
            self._engine = None
            self._restore_model()

    def _restore_model(self) -> None:
        # One at a time, so that memory is freed as it is copied.
        while self._homes:
            master, home = self._homes.pop()
            param = master.weight.param
            # A parameter that points elsewhere got other data from the user, which stays.
            if param.data_ptr() == master.host.data_ptr():
                move(param, home, self._optimizer, master.value().to(home))
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

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise OffloadError("This handle was removed. Stream the model again.")
        return self._engine

    def _start(self, files: str | Path | Iterable[str | Path] | None) -> None:
        """Do everything that changes the model; ``remove`` undoes it, also half done."""
        specs = [spec for i, spec in enumerate(self._specs) if i not in self._resident]
        mapped = map_frozen(specs, files) if self.policy.host == FILE else None
        units = []
        total = sum(payload_bytes(spec, self.policy.host_dtype) for spec in specs)
        pool = master_pool_bytes(self.policy, self._specs)
        pinned = mapped is None and (pool is None or total <= pool)
        allocate = partial(self._backend.host_buffer, pinned=pinned)
        # The blocks leave the device before anything else comes to it, one by one: both need not
        # fit at the same time, and neither need two copies of the whole model fit on the host.
        for spec in specs:
            _STREAMED.add(spec.module)
            self._claimed.append(spec.module)
            units.append(build(spec, mapped, self.policy.host_dtype, allocate))
            for master in units[-1].masters:
                param = master.weight.param
                self._homes.append((master, param.device))
                move(param, torch.device("cpu"), self._optimizer, master.host)
        self._move_residents()
        self._engine = self._make_engine(units, pool)
        triggers = Triggers(self._engine)
        hooks = list[Removable](
            triggers.register(self._model, self._before_forward, self._after_forward)
        )
        # torch keeps this hook in a global list, which must not keep the model alive.
        hooks.append(
            register_module_parameter_registration_hook(partial(_note_growth, weakref.ref(self)))
        )
        for unit in units:
            for master in unit.masters:
                if master.codes is not None:
                    hooks.extend(state_dict_hooks(master))
        self._undo.extend(hook.remove for hook in hooks)

    def _make_engine(self, units: list[Unit], pool_bytes: int | None) -> Engine:
        count = min(self.policy.slots, len(units))
        size = aligned(max(u.device_bytes for u in units))
        dtypes = frozenset[torch.dtype]().union(*(u.dtypes for u in units))
        # Before the slots are marked: the first copy into its memory waits for their marks, too.
        fetcher = Fetcher(self._backend, units, pool_bytes)
        slots = []
        for _ in range(count):
            memory = self._backend.allocate(size)
            typed = {dtype: memory.view(dtype) for dtype in dtypes}
            # Nobody used the slot yet, but its memory may have been used before it was allocated:
            # the first copy into it waits for compute up to here.
            slots.append(Slot(memory, typed, free=self._backend.mark()))
        ring = Ring(units=len(units), slots=count, window=self.policy.prefetch_window)
        return Engine(units, ring, slots, fetcher, self._backend)

    def _before_forward(self) -> None:
        if self._watch is not None:
            self._watch.begin()
        self._residents.check()
        if self._grown:
            self._move_residents()

    def _after_forward(self) -> None:
        if self._watch is not None:
            self._watch.end()

    def _move_residents(self) -> None:
        """Move what is not streamed to the device, adapters that came later included."""
        self._grown = False
        self._residents.adopt(self._model, {id(master.weight.param) for master, _ in self._homes})


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
        device: where compute happens; default: torch's accelerator if it has memory of its
            own, else cpu.
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
    specs = find_units(model, policy)
    check_units(model, specs, _STREAMED)
    check_pool(policy, specs)
    handle = Handle(model, policy, backend, optimizer, specs)
    try:
        handle._start(files)
    except BaseException:
        # Half of the model may have moved; the caller gets it back as it was.
        handle.remove()
        raise
    return handle


def _note_growth(
    handle: weakref.ref[Handle], module: nn.Module, name: str, param: nn.Parameter
) -> None:
    # Of any module in the process: whether it lies in this model is found out at the next forward.
    live = handle()
    if live is not None:
        live._grown = True
