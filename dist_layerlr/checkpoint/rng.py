"""Random number generators of a rank: torch's on the CPU and its GPU, Python's and numpy's."""

from __future__ import annotations

import base64
import json
import random
import sys
import zlib
from typing import Any

import torch
from torch import Tensor


def read_rng() -> Tensor:
    """The state of this rank's generators, as bytes of JSON: uint8, 1-D."""
    state: dict[str, Any] = {"torch": _text(torch.get_rng_state()), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    # numpy is not imported for this: a program that does not use it has no state of it to keep.
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def write_rng(saved: Tensor) -> None:
    """Put a state of ``read_rng`` back. Generators that were not in use then are left alone."""
    state = json.loads(bytes(saved.tolist()))
    torch.set_rng_state(_tensor(state["torch"]))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(state["numpy"]))


def fork_rng(saved: Tensor, rank: int) -> None:
    """Seed a rank that the checkpoint does not know, from rank 0's saved state and its own number.

    Two resumes on the same number of ranks then draw the same numbers.
    """
    seed = zlib.crc32(bytes(saved.tolist()) + rank.to_bytes(4, "big"))
    torch.manual_seed(seed)  # This seeds every GPU, too.
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
