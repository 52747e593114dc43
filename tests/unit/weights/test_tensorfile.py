"""Parts of safetensors files: what we read is what the library wrote, and the other way round;
exports are whole."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dist_layerlr import ConfigError
from dist_layerlr.errors import ModelSourceError
from dist_layerlr.export.folder import publish, split
from dist_layerlr.weights.tensorfile import DTYPES, Entry, file_order, stored_tensors, write


def tensors() -> dict[str, torch.Tensor]:
    """One of each dtype, odd sizes, a scalar and an empty one."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: (100 * torch.rand(3, 5, generator=generator)).to(dtype)
        for name, dtype in DTYPES.items()
    }
    return {
        **made,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": torch.arange(7, dtype=torch.uint8),
    }


def entries(state: dict[str, torch.Tensor]) -> list[Entry]:
    return [
        Entry(name=name, shape=tuple(value.shape), dtype=value.dtype)
        for name, value in state.items()
    ]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in (a, b)]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def test_any_run_of_elements_is_read_as_the_library_wrote_it(tmp_path: Path) -> None:
    state = tensors()
    save_file(state, str(tmp_path / "m.safetensors"))
    stored = stored_tensors(tmp_path / "m.safetensors")
    assert stored.keys() == state.keys()
    for name, value in state.items():
        flat = value.reshape(-1)
        for start in range(flat.numel() + 1):
            for numel in range(flat.numel() - start + 1):
                assert same(stored[name].read(start, numel), flat[start : start + numel]), name


def test_the_library_reads_what_is_written_here(tmp_path: Path) -> None:
    state = tensors()
    order = file_order(entries(state))
    asked = []
    write(
        tmp_path / "m.safetensors",
        order,
        lambda e: asked.append(e.name) or state[e.name],
        {"step": "3"},
    )
    assert asked == [entry.name for entry in order]
    with safe_open(str(tmp_path / "m.safetensors"), framework="pt") as file:
        assert file.metadata() == {"step": "3"}
    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == state.keys() and all(same(read[name], state[name]) for name in state)
    stored = stored_tensors(tmp_path / "m.safetensors").values()
    assert all(
        place.offset % place.dtype.itemsize == 0 for place in stored
    )  # older versions view the file in place


def test_a_dtype_that_the_format_lacks_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"Cannot write 'freqs': it is torch\.complex128, which safetensors files cannot",
    ):
        write(
            tmp_path / "m",
            [Entry(name="freqs", shape=(2,), dtype=torch.complex128)],
            lambda _: torch.zeros(2),
            {},
        )


def test_a_tensor_is_cast_to_what_the_header_says(tmp_path: Path) -> None:
    entry = Entry(name="a", shape=(2,), dtype=torch.bfloat16)
    write(tmp_path / "m.safetensors", [entry], lambda _: torch.tensor([1.0, 1.001]), {})
    assert same(load_file(tmp_path / "m.safetensors")["a"], torch.tensor([1.0, 1.001]).bfloat16())


def test_a_file_that_shrinks_or_goes_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.ones(100)}, str(path))
    stored = stored_tensors(path)["a.weight"]
    os.truncate(path, path.stat().st_size - 1)
    assert stored.read(0, 99).sum() == 99
    with pytest.raises(ModelSourceError, match=r"m\.safetensors' ends within tensor 'a\.weight'"):
        stored.read(50, 50)
    path.unlink()
    with pytest.raises(ModelSourceError, match=r"Cannot read tensor 'a\.weight' of .*No such file"):
        stored.read(0, 1)


STATE = {f"w{i}": torch.full((10, 10), float(i)) for i in range(5)}


def put(
    folder: Path,
    state: dict[str, torch.Tensor],
    file_bytes: int,
    texts: dict[str, str] | None = None,
) -> None:
    files = split(entries(state), "model", file_bytes)
    publish(folder, "model", files, lambda entry: state[entry.name], {"format": "pt"}, texts or {})


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_files_are_split_and_named_as_huggingface_does_it(tmp_path: Path) -> None:
    put(tmp_path, STATE, 900)
    wanted = split_torch_state_dict_into_shards(
        STATE, filename_pattern="model{suffix}.safetensors", max_shard_size=900
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": wanted.metadata, "weight_map": wanted.tensor_to_filename}
    assert names(tmp_path) == {*wanted.filename_to_tensors, "model.safetensors.index.json"}
    read = {
        name: value
        for file in wanted.filename_to_tensors
        for name, value in load_file(tmp_path / file).items()
    }
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


def test_an_export_leaves_nothing_of_an_earlier_one_and_all_of_others(tmp_path: Path) -> None:
    (tmp_path / "model_ema.safetensors").write_text("mine")
    put(tmp_path, STATE, 900, {"config.json": "{}"})
    put(tmp_path, STATE, 10**9)
    assert names(tmp_path) == {"model.safetensors", "config.json", "model_ema.safetensors"}
    put(tmp_path, STATE, 450)
    assert len(names(tmp_path)) == 8 and "model.safetensors" not in names(tmp_path)


@pytest.mark.parametrize("file_bytes", [900, 10**9])
def test_a_full_disk_leaves_the_earlier_export_as_it_was(tmp_path: Path, file_bytes: int) -> None:
    put(tmp_path, STATE, file_bytes)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    seen = []

    def fetch(entry: Entry) -> torch.Tensor:
        seen.append(entry)
        if len(seen) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return -STATE[entry.name]

    with pytest.raises(OSError, match="No space"):
        publish(tmp_path, "model", split(entries(STATE), "model", file_bytes), fetch, {}, {})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
