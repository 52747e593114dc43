"""Headers of safetensors files, with the safetensors library as the oracle."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from dist_layerlr import LayerLRError, read_model
from dist_layerlr.files import StoredTensor, read_safetensors_header

GOOD = {
    "b": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
    "c": {"dtype": "F4", "shape": [2, 2], "data_offsets": [16, 18]},
    "d": {"dtype": "BOOL", "shape": [], "data_offsets": [18, 19]},
}
"""Types that torch lacks among them: a plan needs names and shapes only."""


def put(path: Path, rows: Any, data: int = 19) -> Path:
    text = json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def test_a_header_says_what_the_library_says_and_where_the_bytes_lie(tmp_path: Path) -> None:
    path = put(tmp_path / "m.safetensors", {"__metadata__": {"caption": "x"}, **GOOD})
    found = read_safetensors_header(path)
    with safe_open(path, framework="np") as file:
        assert list(found.tensors) == list(file.keys())
        for name, stored in found.tensors.items():
            view = file.get_slice(name)
            assert (stored.shape, stored.dtype) == (tuple(view.get_shape()), view.get_dtype())
        assert found.metadata == file.metadata()
    first = path.stat().st_size - 19
    assert found.tensors["a"] == StoredTensor(shape=(2, 3), dtype="BF16", offset=first + 4)
    shapes = {info.name: info.shape for info in read_model(path)}
    assert shapes == {"a": (2, 3), "b": (4,), "c": (2, 2), "d": ()}


DAMAGED = {
    "a gap": ({**GOOD, "d": {**GOOD["d"], "data_offsets": [19, 20]}}, 20),
    "an overlap": ({**GOOD, "d": {**GOOD["d"], "data_offsets": [17, 18]}}, 18),
    "too few bytes for the shape": ({**GOOD, "a": {**GOOD["a"], "shape": [2, 4]}}, 19),
    "half a byte": ({**GOOD, "c": {**GOOD["c"], "shape": [3]}}, 19),
    "a negative size": ({**GOOD, "c": {**GOOD["c"], "shape": [-2, -2]}}, 19),
    "data that end early": (GOOD, 18),
    "data that end late": (GOOD, 20),
    "no offsets": ({"a": {"dtype": "F32", "shape": []}}, 4),
    "a type that is no text": ({"a": {"dtype": 3, "shape": [], "data_offsets": [0, 4]}}, 4),
    "a list": ([], 0),
    "a number": (3, 0),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_what_the_library_refuses_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = put(tmp_path / "m.safetensors", *DAMAGED[damage])
    with pytest.raises(SafetensorError), safe_open(path, framework="np"):
        pass
    with pytest.raises(LayerLRError, match=r"Cannot read safetensors file .*m\.safetensors"):
        read_safetensors_header(path)


def test_a_damaged_length_does_not_become_an_allocation(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(LayerLRError, match="header of 18446744073709551615 bytes is too large"):
        read_safetensors_header(path)
