"""Host masters: the values of streamed parameters in host memory, or mapped from their files.

A unit's masters lie in one arena of exactly their size, in the order and with the gaps of its
*payload*: the bytes that one fetch copies. Without ``host_dtype`` the payload is also, byte for
byte, what the slot holds. Masters that are mapped from safetensors files stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from numpy import add
from torch import Tensor, nn

from dist_layerlr.offload.codec import decode, encode, encoded_rows
from dist_layerlr.offload.internals import registered_parameter, write_count
from dist_layerlr.offload.pinning import host_buffer
from dist_layerlr.offload.units import Streamed, UnitSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALIGNMENT = 256
"""Bytes; what copies and kernels like best."""
_SAMPLES = 64
"""Least words of each master that tell, between passes, whether it was written to."""
_FEW, _MOST = 16, 4096
"""During a pass: least words of each master, and most of a unit."""
_WORDS = {1: "u1", 2: "i2", 4: "i4", 8: "i8"}
_address, _kind = Tensor.data_ptr, attrgetter("dtype", "requires_grad")
_SMALL = 2**16
"""Bytes of a unit that is read whole between passes."""
Files = Mapping[str, Tensor]
"""{parameter name: tensor mapped from its file}."""


@dataclass(slots=True, kw_only=True)
class Master:
    """One parameter: its value on the host, and its places in the payload and in the slot."""

    weight: Streamed
    trainable: bool
    """Whether the parameter required a gradient when it was streamed."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    slot_offset: int
    """First byte in the slot."""
    payload_offset: int
    """First byte in the payload."""
    host: Tensor
    """What the parameter points at while it is not on the device. Of an encoded master it has the
    shape and dtype, but NaN for values."""
    stored: Tensor
    """The master's bytes, as the payload holds them."""
    home: int
    """Address of ``host`` when it was made."""
    codes: torch.dtype | None = None
    """8-bit dtype of an encoded master, whose scales (float32, one per row) follow the codes."""
    mapped: bool = False
    """Whether the master lies in a file."""

    @property
    def name(self) -> str:
        """As in ``model.named_parameters()``."""
        return self.weight.name

    @property
    def nbytes(self) -> int:
        """Bytes in the slot."""
        return self.shape.numel() * self.dtype.itemsize

    def view_in(self, slot: Tensor) -> Tensor:
        """The parameter's view of slot memory that has the parameter's dtype."""
        return slot.as_strided(self.shape, self.stride, self.slot_offset // self.dtype.itemsize)

    def expand(self, payload: Tensor, target: Tensor) -> None:
        """Write the parameter's value from a payload (bytes); both on one device."""
        part = payload[self.payload_offset : self.payload_offset + self.stored.numel()]
        if self.codes is None:
            target.copy_(part.view(self.dtype).as_strided(self.shape, self.stride))
            return
        # One byte per code; the scales start at the next aligned byte.
        codes, scale = part[: self.shape.numel()], part[aligned(self.shape.numel()) :]
        rows = encoded_rows(self.shape)
        decode(
            codes.view(self.codes).view(rows, -1), scale.view(torch.float32).view(rows, 1), target
        )

    def value(self) -> Tensor:
        """The parameter's value, in host memory of its own, or mapped from its file."""
        if self.codes is None:
            # A mapped tensor keeps its file open by itself; an arena is unpinned and freed with its
            # unit, so the value must not stay in it.
            return self.host if self.mapped else self.host.clone()
        value = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="cpu")
        # expand() reads at payload_offset, so the bytes before it are filled up.
        payload = torch.cat([self.stored.new_zeros(self.payload_offset), self.stored])
        self.expand(payload, value)
        return value


class Unit:
    """A unit of the model with its masters."""

    def __init__(self, spec: UnitSpec, masters: list[Master], arena: Tensor | None):
        self.name, self.module, self.numel = spec.name, spec.module, spec.numel
        self.masters = masters
        self.arena = arena
        """All masters in one run of memory; None: they stand alone."""
        last = masters[-1]
        self.host_bytes = last.payload_offset + last.stored.numel()
        self.device_bytes = last.slot_offset + last.nbytes
        self.encoded = any(m.codes is not None for m in masters)
        self.dtypes = frozenset(m.dtype for m in masters)
        self.trained = frozenset(m.dtype for m in masters if m.trainable)
        """Dtypes of trainable weights."""
        self.steps = 0
        """Optimizer steps on these weights. A fused step changes no version counter."""
        self.edition = 0
        """Number of times that ``arrive`` found the weights written to since the time before."""
        self._arrived_at: tuple[int, ...] | None = None
        # What every visit reads of each parameter, in lists that it walks without Python's help.
        self._params = [m.weight.param for m in masters]
        self._homes = [m.host for m in masters]
        self._owners = [m.weight.owner for m in masters]
        self._leaves = [m.weight.leaf for m in masters]
        self._addresses = [m.home for m in masters]
        self._kinds = [(m.dtype, m.trainable) for m in masters]
        # Views of the masters, taken once. Nobody can write to an encoded master.
        self._words = _words_of_all(masters, arena)
        self._rows: list[NDArray[Any]] = []
        self._bytes: memoryview | None = None
        if arena is not None and arena.numel() <= _SMALL:
            # One look at everything takes less than one for each master.
            self._bytes = arena.numpy().data
        else:
            self._rows = [_words_of_each_row(m) for m in masters if m.codes is None]

    @property
    def at_rest(self) -> bool:
        """Whether every parameter is what it was, points at its master, and is not frozen since."""
        # share_memory() moves the memory under a tensor that stays the same object, so addresses
        # are compared.
        return (
            list(map(_address, self._params)) == self._addresses
            and list(map(_kind, self._params)) == self._kinds
            and all(map(is_, map(registered_parameter, self._owners, self._leaves), self._params))
        )

    def point_at(self, views: Iterable[Tensor]) -> None:
        """Point the parameters at these views of a slot."""
        # .data keeps the Parameter object, and with it the optimizer's groups and state.
        for param, view in zip(self._params, views, strict=True):
            param.data = view

    def point_at_host(self) -> None:
        """Point the parameters at their masters."""
        self.point_at(self._homes)

    def arrive(self, versions: tuple[int, ...]) -> None:
        """The parameters are about to point at the device: note which edition of the weights it is.

        Args:
            versions: as they are now.
        """
        if versions != self._arrived_at:
            self.edition += 1
            self._arrived_at = versions

    @property
    def written_since_arrival(self) -> bool:
        """Whether somebody wrote through a parameter while it pointed at the device."""
        return self.versions() != self._arrived_at

    def rest_stamp(self) -> tuple[int, ...]:
        """As ``stamp``, for longer times: it also changes with a write to a single row."""
        versions = self.versions()
        if self._bytes is not None:
            return (*versions, crc32(self._bytes))
        return (*self.stamp(versions), sum(map(int, map(add.reduce, self._rows))))

    def trained_at(self) -> dict[int, nn.Parameter]:
        """{first byte in the slot: parameter} of those that train."""
        return {m.slot_offset: m.weight.param for m in self.masters if m.trainable}

    def fill(self, staging: Tensor) -> Tensor:
        """Copy the payload into a staging buffer and return the filled part."""
        payload = staging[: self.host_bytes]
        if self.arena is not None:
            return payload.copy_(self.arena)
        for master in self.masters:
            end = master.payload_offset + master.stored.numel()
            payload[master.payload_offset : end].copy_(master.stored)
        return payload

    def versions(self) -> tuple[int, ...]:
        """Numbers that change with every write through a parameter, and every optimizer step."""
        return (self.steps, *map(write_count, self._params))

    def stamp(self, versions: tuple[int, ...]) -> tuple[int, ...]:
        """Numbers that tell whether a copy on the device is still what the masters hold.

        They change with every write through a parameter, and with one through ``.data`` that
        touches a sampled word.

        Args:
            versions: as they are now.
        """
        # As integers: the sum of floats could lose a small change, or be NaN. By numpy, whose call
        # takes a quarter of torch's: this runs twice whenever a unit is fetched.
        words = 0 if self._words is None else int(add.reduce(self._words))
        return (*versions, words)


def _words_of_all(masters: list[Master], arena: Tensor | None) -> NDArray[Any] | None:
    """Words of an arena, evenly spaced, so that one call reads a few of every master.

    None where that shows nothing: masters that stand alone lie in a file, which a look would read
    from the disk, or train, so that no copy outlives a pass; encoded ones nobody can write to.
    """
    if arena is None or all(m.codes is not None for m in masters):
        return None
    # Arenas are not padded, so the length of the last master decides how wide a word may be.
    size = math.gcd(arena.numel(), 8)
    words: NDArray[Any] = arena.numpy().view(f"i{size}")
    apart = min(m.stored.numel() for m in masters) // size // _FEW
    # A small master among large ones would ask for more words than are read in no time.
    return words[:: max(1, apart, words.size // _MOST)]


def aligned(nbytes: int) -> int:
    """Round up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def sample(tensor: Tensor, count: int) -> Tensor:
    """Evenly spaced elements of a tensor, about ``count``, as one dimension.

    They are a view where the tensor is contiguous, so that they follow later writes.
    """
    return tensor.reshape(-1)[:: max(1, tensor.numel() // count)]


def payload_bytes(spec: UnitSpec, host_dtype: str | None) -> int:
    """Bytes of one fetch of a unit that is not built yet."""
    sizes = _stored_sizes(spec, host_dtype)
    return _offsets(sizes)[-1] + sizes[-1]


def slot_bytes(spec: UnitSpec) -> int:
    """Bytes of device memory for a unit."""
    return sum(aligned(w.param.nbytes) for w in spec.weights)


def build(
    spec: UnitSpec,
    files: Files | None,
    host_dtype: str | None,
    allocate: Callable[[int], Tensor] = host_buffer,
) -> Unit:
    """Copy a unit's values into masters. Nothing points at them yet.

    Args:
        spec: the unit.
        files: where frozen masters are, if they stay in their files.
        host_dtype: 8-bit format of frozen masters.
        allocate: makes host bytes for the arena.
    """
    sizes = _stored_sizes(spec, host_dtype)
    starts = _offsets(sizes)
    offsets = _offsets([w.param.nbytes for w in spec.weights])
    arena = allocate(starts[-1] + sizes[-1]) if files is None else None
    masters = []
    for weight, size, start, offset in zip(spec.weights, sizes, starts, offsets, strict=True):
        frozen = not weight.param.requires_grad
        if files is not None and frozen:
            host = files[weight.name]
            stored, codes = host.view(-1).view(torch.uint8), None
        else:
            stored = part_of(arena, start, size)
            host, codes = _store(stored, weight.param.detach(), host_dtype if frozen else None)
        masters.append(
            Master(
                weight=weight,
                trainable=not frozen,
                dtype=weight.param.dtype,
                shape=weight.param.shape,
                stride=_slot_stride(weight.param, keep=codes is None and files is None),
                slot_offset=offset,
                payload_offset=start,
                host=host,
                stored=stored,
                home=host.data_ptr(),
                codes=codes,
                mapped=files is not None and frozen,
            )
        )
    return Unit(spec, masters, arena)


def part_of(arena: Tensor | None, start: int, nbytes: int) -> Tensor:
    """Bytes for one tensor: a run of the arena, or memory of its own."""
    if arena is None:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    # Through numpy the run gets a storage of its own. With a slice of the arena, torch.save of one
    # parameter would write its neighbours, too.
    return torch.from_numpy(arena.numpy()[start : start + nbytes])


def _store(
    stored: Tensor, data: Tensor, host_dtype: str | None
) -> tuple[Tensor, torch.dtype | None]:
    """Write a value into its master's bytes.

    Returns:
        what the parameter points at from now on, and the dtype of the codes (None: not encoded).
    """
    if host_dtype is None:
        stride = _slot_stride(data, keep=True)
        host = stored.view(data.dtype).as_strided(data.shape, stride)
        return host.copy_(data), None
    codes, scale = encode(data.cpu(), host_dtype)
    stored[: codes.numel()].copy_(codes.view(-1).view(torch.uint8))
    stored[aligned(codes.numel()) :].copy_(scale.view(-1).view(torch.uint8))
    # One NaN, expanded: the right shape and dtype without memory, and no use as a value.
    nan = torch.full((), float("nan"), dtype=data.dtype, device="cpu")
    return nan.expand(data.shape), codes.dtype


def _stored_sizes(spec: UnitSpec, host_dtype: str | None) -> list[int]:
    """Bytes of each master: codes and scales, or the weight as it is."""
    sizes = []
    for weight in spec.weights:
        param = weight.param
        if param.requires_grad or host_dtype is None:
            sizes.append(param.nbytes)
        else:
            # Codes take one byte each; the scales behind them are float32, of 4 bytes.
            sizes.append(aligned(param.numel()) + 4 * encoded_rows(param.shape))
    return sizes


def _offsets(sizes: list[int]) -> list[int]:
    """Where each of some parts starts, every start aligned."""
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(offsets[-1] + aligned(size))
    return offsets


def _words_of_each_row(master: Master) -> NDArray[Any]:
    """At least one word of every row and of every column."""
    words: NDArray[Any] = master.stored.numpy().view(_WORDS.get(master.dtype.itemsize, "u1"))
    columns = 1
    for size, step in zip(master.shape, master.stride, strict=True):
        if size > 1:
            columns = max(columns, step)
    apart = words.size // _SAMPLES
    if columns > 1:
        apart = min(apart, columns - 1, words.size // columns)
    # Steps shorter than a row meet each row; steps without a divisor in common with the row's
    # length meet each place in it before they meet one again, and there are enough of them.
    while math.gcd(apart, columns) > 1:
        apart -= 1
    return words[:: max(1, apart)]


def _slot_stride(data: Tensor, *, keep: bool) -> tuple[int, ...]:
    """Strides of a parameter in the slot: its own if it may keep them and fills its memory."""
    if keep and _is_dense(data):
        return data.stride()
    return torch.empty(data.shape, device="meta").stride()


def _is_dense(data: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order."""
    expected = 1
    for stride, size in sorted(zip(data.stride(), data.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
