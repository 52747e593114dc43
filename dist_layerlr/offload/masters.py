"""Host masters: one exact-size arena per unit, laid out as its payload, or tensors mapped from
safetensors files.

The *payload* is what is copied for a unit, byte for byte. Without ``host_dtype`` it is also the
content of the slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_layerlr.offload.codec import decode, encode, encoded_rows
from dist_layerlr.offload.device import host_buffer
from dist_layerlr.offload.units import Cut, Weight

ALIGNMENT = 256
"""Bytes; what copies and kernels like best."""
_SAMPLES = 64
"""Words of each master that tell whether it was written to."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Files = Mapping[str, Tensor]
"""{parameter name: tensor mapped from its file}."""


@dataclass(slots=True, kw_only=True)
class Piece:
    """One parameter: its place in the slot, its master, and the master's place in the payload."""

    weight: Weight
    trainable: bool
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    """First byte in the slot."""
    start: int
    """First byte in the payload."""
    host: Tensor
    """What the parameter points at while it is not on the device; no values if the master is
    encoded."""
    master: Tensor
    """Bytes of the payload."""
    address: int
    """Of the master when it was made."""
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

    def on(self, slot: Tensor) -> Tensor:
        """The parameter's view of a slot, which is typed as it is."""
        return slot.as_strided(self.shape, self.stride, self.offset // self.dtype.itemsize)

    def expand(self, payload: Tensor, target: Tensor) -> None:
        """Write the parameter's value from a payload (bytes); both on one device."""
        part = payload[self.start : self.start + self.master.numel()]
        if self.codes is None:
            target.copy_(part.view(self.dtype).as_strided(self.shape, self.stride))
            return
        codes, scale = part[: self.shape.numel()], part[aligned(self.shape.numel()) :]
        rows = encoded_rows(self.shape)
        decode(
            codes.view(self.codes).view(rows, -1), scale.view(torch.float32).view(rows, 1), target
        )

    def value(self) -> Tensor:
        """The parameter's value, in host memory of its own, or mapped from its file."""
        if self.codes is None:
            return self.host if self.mapped else self.host.clone()
        value = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        self.expand(torch.cat([self.master.new_zeros(self.start), self.master]), value)
        return value


class Unit:
    """A cut of the model with its masters."""

    def __init__(self, cut: Cut, pieces: list[Piece], arena: Tensor | None):
        self.name, self.module, self.numel = cut.name, cut.module, cut.numel
        self.pieces = pieces
        self.arena = arena
        """All masters in one run of memory; None: they stand alone."""
        last = pieces[-1]
        self.host_bytes = last.start + last.master.numel()
        self.device_bytes = last.offset + last.nbytes
        self.grad_bytes = sum(p.nbytes for p in pieces if p.trainable)
        self.encoded = any(p.codes is not None for p in pieces)
        self.dtypes = frozenset(p.dtype for p in pieces)
        self.trained = frozenset(p.dtype for p in pieces if p.trainable)
        """Dtypes of trainable weights."""
        self._samples = [_sample(p) for p in pieces if p.codes is None]

    def fill(self, staging: Tensor) -> Tensor:
        """Copy the payload into a staging buffer and return the filled part."""
        payload = staging[: self.host_bytes]
        if self.arena is not None:
            return payload.copy_(self.arena)
        for piece in self.pieces:
            payload[piece.start : piece.start + piece.master.numel()].copy_(piece.master)
        return payload

    def versions(self) -> tuple[int, ...]:
        """Changes with every write through a parameter."""
        return tuple(p.weight.param._version for p in self.pieces)

    def stamp(self) -> tuple[int, ...]:
        """Changes with every write through a parameter, and with one through ``.data`` that touches
        a sampled word.
        """
        return (*self.versions(), sum(int(words.sum()) for words in self._samples))


def aligned(nbytes: int) -> int:
    """Round up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def payload_bytes(cut: Cut, host_dtype: str | None) -> int:
    """Bytes of one fetch of a unit that is not built yet."""
    sizes = _sizes(cut, host_dtype)
    return _offsets(sizes)[-1] + sizes[-1]


def slot_bytes(cut: Cut) -> int:
    """Bytes of device memory for a unit."""
    return sum(aligned(w.param.numel() * w.param.element_size()) for w in cut.weights)


def build(cut: Cut, files: Files | None, host_dtype: str | None) -> Unit:
    """Copy a unit's values into masters. Nothing points at them yet.

    Args:
        cut: the unit.
        files: where frozen masters are, if they stay in their files.
        host_dtype: 8-bit format of frozen masters.
    """
    formats = [None if w.param.requires_grad else host_dtype for w in cut.weights]
    sizes = _sizes(cut, host_dtype)
    starts = _offsets(sizes)
    offsets = _offsets([w.param.numel() * w.param.element_size() for w in cut.weights])
    arena = host_buffer(starts[-1] + sizes[-1]) if files is None else None
    pieces = []
    for weight, form, size, start, offset in zip(
        cut.weights, formats, sizes, starts, offsets, strict=True
    ):
        data = weight.param.detach()
        codes: torch.dtype | None = None
        mapped = files is not None and not weight.param.requires_grad
        if files is not None and mapped:
            host = files[weight.name]
            master = host.view(-1).view(torch.uint8)
        else:
            master = (
                torch.empty(size, dtype=torch.uint8)
                if arena is None
                else _carve(arena, start, size)
            )
            host, codes = _write(master, data, form)
        stride = (
            data.stride()
            if codes is None and _is_dense(data) and files is None
            else _contiguous_stride(data)
        )
        pieces.append(
            Piece(
                weight=weight,
                trainable=weight.param.requires_grad,
                dtype=data.dtype,
                shape=data.shape,
                stride=stride,
                offset=offset,
                start=start,
                host=host,
                master=master,
                address=master.data_ptr(),
                codes=codes,
                mapped=mapped,
            )
        )
    return Unit(cut, pieces, arena)


def _write(master: Tensor, data: Tensor, form: str | None) -> tuple[Tensor, torch.dtype | None]:
    """Put a value into its master.

    Returns what the parameter points at, and the dtype of the codes.
    """
    if form is None:
        stride = data.stride() if _is_dense(data) else _contiguous_stride(data)
        host = master.view(data.dtype).as_strided(data.shape, stride)
        return host.copy_(data), None
    codes, scale = encode(data.cpu(), form)
    master[: codes.numel()].copy_(codes.view(-1).view(torch.uint8))
    master[aligned(codes.numel()) :].copy_(scale.view(-1).view(torch.uint8))
    return torch.full((), float("nan"), dtype=data.dtype).expand(data.shape), codes.dtype


def _sizes(cut: Cut, host_dtype: str | None) -> list[int]:
    """Bytes of each master: codes and scales, or the weight as it is."""
    params = [w.param for w in cut.weights]
    return [
        p.numel() * p.element_size()
        if p.requires_grad or host_dtype is None
        else aligned(p.numel()) + 4 * encoded_rows(p.shape)
        for p in params
    ]


def _offsets(sizes: list[int]) -> list[int]:
    offsets = [0]
    for size in sizes[:-1]:
        offsets.append(offsets[-1] + aligned(size))
    return offsets


def _carve(arena: Tensor, start: int, nbytes: int) -> Tensor:
    """A run of the arena as a tensor with a storage of its own, so that saving it does not save its
    neighbours.
    """
    return torch.from_numpy(arena.numpy()[start : start + nbytes])


def _sample(piece: Piece) -> Tensor:
    words = piece.master.view(_WORDS.get(piece.dtype.itemsize, torch.uint8))
    return words[:: max(1, words.numel() // _SAMPLES)]


def _is_dense(data: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order."""
    expected = 1
    for stride, size in sorted(zip(data.stride(), data.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous_stride(data: Tensor) -> tuple[int, ...]:
    return torch.empty(data.shape, device="meta").stride()
