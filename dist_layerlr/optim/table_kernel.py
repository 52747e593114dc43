"""The Triton kernel of ``TableAdamW``. Import it late: triton is there on few machines.

One program steps one block of one tensor. Which one, where it lies and at which rates it moves
stands in tables on the device, so a launch takes any number of tensors and rates.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Elements of a program: 16 for each of its 256 threads."""
WARPS = 8
TENSORS = ("parameter", "gradient", "first moment", "second moment")
"""Rows of the table of addresses; behind them stands the number of elements."""
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
ALIGNMENT = 16
"""Bytes that a thread reads at once. Triton cannot know it of an address in a table."""


def _rounded(x: tl.tensor, TYPE: tl.constexpr, BY_HAND: tl.constexpr) -> tl.tensor:
    """To the nearest number of a type. Triton's interpreter cuts bfloat16's digits off."""
    if BY_HAND and TYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(TYPE)


rounded: Any = triton.jit(_rounded)


def _move(
    param: tl.tensor,
    gradient: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    rates: tl.tensor,
    segments: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_HAND: tl.constexpr,
) -> None:
    """Step one block; ``rates`` points at the segment's column in the table of rates."""
    places = start + tl.arange(0, BLOCK)
    params, gradients = param + places, gradient + places
    firsts, seconds = first + places, second + places
    if ALIGNED:
        params, gradients = tl.multiple_of(params, 16), tl.multiple_of(gradients, 16)
        firsts, seconds = tl.multiple_of(firsts, 16), tl.multiple_of(seconds, 16)
    inside = None
    if MASKED:
        inside = places < size
    p = tl.load(params, mask=inside).to(WORK)
    g = tl.load(gradients, mask=inside).to(WORK)
    m = tl.load(firsts, mask=inside).to(WORK)
    v = tl.load(seconds, mask=inside).to(WORK)
    m = m + tl.load(rates + 2 * segments) * (g - m)
    v = v * tl.load(rates + 3 * segments) + tl.load(rates + 4 * segments) * g * g
    # Rounded as torch rounds: a card's quick root and quotient are off by two units.
    if WORK == tl.float32:
        root = tl.div_rn(tl.sqrt_rn(v), tl.load(rates + 5 * segments))
        move = tl.div_rn(m, root + tl.load(rates + 6 * segments))
    else:
        root = tl.sqrt(v) / tl.load(rates + 5 * segments)
        move = m / (root + tl.load(rates + 6 * segments))
    p = p * tl.load(rates + segments) - tl.load(rates) * move
    tl.store(params, rounded(p, param.dtype.element_ty, BY_HAND), mask=inside)
    tl.store(firsts, rounded(m, first.dtype.element_ty, BY_HAND), mask=inside)
    tl.store(seconds, rounded(v, second.dtype.element_ty, BY_HAND), mask=inside)


move: Any = triton.jit(_move)


def _adamw(
    addresses: tl.tensor,
    chunks: tl.tensor,
    rates: tl.tensor,
    segments: tl.tensor,
    P: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
    WORK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_HAND: tl.constexpr,
) -> None:
    """Step the block that ``chunks`` gives this program.

    Args:
        addresses: int64 (5, segments): of the four tensors, and how many elements they have.
        chunks: int32 (programs, 2): segment, and number of the block in it.
        rates: (7, segments), as ``table_adamw`` computes them.
        segments: how many there are.
        P: type of parameters.
        G: type of gradients.
        M: type of first moments.
        V: type of second moments.
        WORK: type of the arithmetic.
        BLOCK: elements of a block.
        ALIGNED: whether all addresses are multiples of ``ALIGNMENT``.
        BY_HAND: whether the kernel must round by itself, as it does in the interpreter.
    """
    chunk = tl.program_id(0)
    segment = tl.load(chunks + 2 * chunk)
    # Not in 32 bits: a flat parameter may have more elements than these can count.
    start = tl.load(chunks + 2 * chunk + 1).to(tl.int64) * BLOCK
    param = tl.load(addresses + segment).to(tl.pointer_type(P))
    gradient = tl.load(addresses + segments + segment).to(tl.pointer_type(G))
    first = tl.load(addresses + 2 * segments + segment).to(tl.pointer_type(M))
    second = tl.load(addresses + 3 * segments + segment).to(tl.pointer_type(V))
    size = tl.load(addresses + 4 * segments + segment)
    own = rates + segment
    # Two ways, as a mask of unknown length keeps a thread from reading several elements at once.
    if start + BLOCK <= size:
        move(param, gradient, first, second, own, segments, start, size,
             WORK, BLOCK, False, ALIGNED, BY_HAND)  # fmt: skip
    else:
        move(param, gradient, first, second, own, segments, start, size,
             WORK, BLOCK, True, False, BY_HAND)  # fmt: skip


adamw: Any = triton.jit(_adamw)
IS_COMPILED = isinstance(adamw, triton.runtime.JITFunction)
"""Else triton's interpreter runs it, on CPU tensors (``TRITON_INTERPRET=1``)."""
