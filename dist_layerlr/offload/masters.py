"""Host masters: the values of streamed parameters in host memory, or mapped from their files.

A unit's masters lie in one arena of exactly their size, in the order and with the gaps of its
*payload*: the bytes that one fetch copies. Without ``host_dtype`` the payload is also, byte for
byte, what the slot holds. Masters that are mapped from safetensors files stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_layerlr.offload.codec import decode, encode, encoded_rows
from dist_layerlr.offload.internals import write_count
from dist_layerlr.offload.pinning import host_buffer
from dist_layerlr.offload.units import Streamed, UnitSpec

ALIGNMENT = 256
"""Bytes; what copies and kernels like best."""
_SAMPLES = 64
"""Words of each master that tell whether it was written to."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
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
    address: int
    """Of ``stored`` when it was made."""
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
        # Views of the masters, taken once. Nobody can write to an encoded master.
        self._samples = [_sampled_words(m) for m in masters if m.codes is None]
        self._rows = [_words_of_each_row(m) for m in masters if m.codes is None]

    def rest_stamp(self) -> tuple[int, ...]:
        """As ``stamp``, for longer times: it also changes with a write to a single row."""
        return (*self.stamp(), sum(int(words.sum()) for words in self._rows))

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
        return (self.steps, *(write_count(m.weight.param) for m in self.masters))

    def stamp(self) -> tuple[int, ...]:
        """Numbers that tell whether a copy on the device is still what the masters hold.

        They change with every write through a parameter, and with one through ``.data`` that
        touches a sampled word.
        """
        return (*self.versions(), sum(int(words.sum()) for words in self._samples))


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
            stored = _memory(arena, start, size)
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
                address=stored.data_ptr(),
                codes=codes,
                mapped=files is not None and frozen,
            )
        )
    return Unit(spec, masters, arena)


def _memory(arena: Tensor | None, start: int, nbytes: int) -> Tensor:
    """Bytes for one master: a run of the arena, or memory of its own."""
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


def _sampled_words(master: Master) -> Tensor:
    # Whole words as integers: the sum of floats could lose a small change, or be NaN.
    words = master.stored.view(_WORDS.get(master.dtype.itemsize, torch.uint8))
    return sample(words, _SAMPLES)


def _words_of_each_row(master: Master) -> Tensor:
    """At least one word of every row and of every column."""
    words = master.stored.view(_WORDS.get(master.dtype.itemsize, torch.uint8))
    columns = 1
    for size, step in zip(master.shape, master.stride, strict=True):
        if size > 1:
            columns = max(columns, step)
    apart = words.numel() // _SAMPLES
    if columns > 1:
        apart = min(apart, columns - 1, words.numel() // columns)
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
