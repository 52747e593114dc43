"""Samples on disk as `CachedDataset` reads and refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch.trainer.data import fit_dataset
from launch.trainer.data.cached import EMPTY_PROMPT, CachedDataset
from launch.trainer.data.order import buckets_of
from launch.trainer.families import get_family
from tests.support.latents import write_sample

WAN = get_family("wan")
WAN_CONFIG = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "patch_size": [1, 2, 2]}


def test_samples_are_sorted_by_path_and_sub_folders_count(tmp_path: Path):
    for index, name in enumerate(["b.safetensors", "a/z.safetensors", "a/y.safetensors"]):
        write_sample(tmp_path / name, torch.full((2, 1, 4, 4), float(index)), torch.zeros(3, 5))
    (tmp_path / ".half.safetensors.1.tmp").write_bytes(b"")
    dataset = CachedDataset(str(tmp_path))
    assert [dataset.name(i) for i in range(len(dataset))] == [
        "y.safetensors",
        "z.safetensors",
        "b.safetensors",
    ]
    assert [float(dataset[i]["latents"].max()) for i in range(3)] == [2.0, 1.0, 0.0]


def test_a_model_of_clips_takes_images_as_clips_of_one_frame(tmp_path: Path):
    write_sample(
        tmp_path / "a.safetensors",
        torch.arange(64.0).view(4, 4, 4),
        torch.zeros(3, 16, dtype=torch.bfloat16),
    )
    write_sample(tmp_path / "b.safetensors", torch.zeros(4, 1, 4, 4), torch.zeros(3, 16))
    dataset = CachedDataset(str(tmp_path))
    assert dataset.shapes(0)["latents"] == dataset[0]["latents"].shape == (4, 4, 4)
    assert len(buckets_of(dataset)) == 2
    fit_dataset(dataset, WAN, WAN_CONFIG)
    assert dataset.shapes(0) == {"latents": (4, 1, 4, 4), "prompt_embeds": (3, 16)}
    torch.testing.assert_close(dataset[0]["latents"], torch.arange(64.0).view(4, 1, 4, 4))
    assert dataset[0]["prompt_embeds"].dtype == torch.float32
    assert len(buckets_of(dataset)) == 1


def test_floats_come_back_as_float32_and_other_types_as_they_are(tmp_path: Path):
    fields = {
        "latents": torch.ones(4, 2, 2, dtype=torch.float16),
        "prompt_embeds": torch.ones(3, 5, dtype=torch.bfloat16),
        "pooled": torch.ones(7, dtype=torch.float64),
        "labels": torch.tensor([2**40, 3]),
        "seen": torch.tensor(True),
    }
    save_file(fields, tmp_path / "a.safetensors")
    sample = CachedDataset(str(tmp_path))[0]
    kinds = {name: tensor.dtype for name, tensor in sample.items()}
    floats = dict.fromkeys(("latents", "prompt_embeds", "pooled"), torch.float32)
    assert kinds == {**floats, "labels": torch.int64, "seen": torch.bool}
    assert sample["labels"].tolist() == [2**40, 3] and bool(sample["seen"])


def test_the_empty_prompt_is_no_sample(tmp_path: Path):
    write_sample(tmp_path / "a.safetensors", torch.zeros(4, 2, 2), torch.zeros(3, 5))
    assert CachedDataset(str(tmp_path)).empty_prompt() is None
    inner = tmp_path / "_cats" / EMPTY_PROMPT
    write_sample(inner, prompt=torch.ones(2, 5, dtype=torch.bfloat16))
    write_sample(tmp_path / EMPTY_PROMPT, prompt=torch.full((1, 5), 2.0))
    dataset = CachedDataset(str(tmp_path))
    assert len(dataset) == 1
    assert torch.equal(dataset.empty_prompt()["prompt_embeds"], torch.full((1, 5), 2.0))


def test_samples_of_a_sub_folder_are_repeated(tmp_path: Path):
    for name in ("b", "cats/a", "cats/big/c"):
        write_sample(tmp_path / f"{name}.safetensors", torch.zeros(4, 2, 2), torch.zeros(3, 5))
    dataset = CachedDataset(str(tmp_path), repeats={"cats": 3, "cats/big": 2})
    stems = [dataset.name(i).partition(".")[0] for i in range(len(dataset))]
    assert stems == ["b", "a", "a", "a", "c", "c"]
    for wrong, message in (
        ({"dogs": 2}, "data.repeats='dogs'"),
        ({"cats": 0}, "data.repeats.cats=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            CachedDataset(str(tmp_path), repeats=wrong)


def test_only_headers_are_read_when_the_data_set_is_made(tmp_path: Path, monkeypatch):
    import launch.trainer.data.cached as cached

    class HeaderOnly:
        """`safe_open` that can be asked for anything but a tensor."""

        def __init__(self, *args: object, **options: object) -> None:
            self._file = safe_open(*args, **options)

        def __enter__(self):
            file = self._file.__enter__()
            self.keys, self.get_slice, self.metadata = file.keys, file.get_slice, file.metadata
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

    write_sample(
        tmp_path / "a.safetensors", torch.zeros(2, 1, 4, 4), torch.zeros(3, 5), caption="a square"
    )
    monkeypatch.setattr(cached, "safe_open", HeaderOnly)
    dataset = CachedDataset(str(tmp_path))
    assert dataset.name(0) == "a square"
    with pytest.raises(AttributeError, match="get_tensor"):
        dataset[0]


@pytest.mark.parametrize(
    ("latents", "prompt", "message"),
    [
        (
            None,
            torch.zeros(3, 5),
            r"bad.safetensors: no field 'latents'; found \['prompt_embeds'\]",
        ),
        (
            torch.zeros(1, 2, 1, 4, 4),
            torch.zeros(3, 5),
            r"latents has shape \(1, 2, 1, 4, 4\), need \(C, F, H, W\)",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(1, 3, 5),
            r"prompt_embeds has shape \(1, 3, 5\), need \(L, D\)",
        ),
        (
            torch.zeros(2, 0, 4, 4),
            torch.zeros(3, 5),
            r"latents has shape \(2, 0, 4, 4\), need every axis >= 1",
        ),
        (
            torch.zeros(2, 1, 4, 4).int(),
            torch.zeros(3, 5),
            r"latents has type I32, need one of F16, BF16",
        ),
    ],
)
def test_a_wrong_field_is_refused_before_training(tmp_path: Path, latents, prompt, message: str):
    write_sample(tmp_path / "a.safetensors", torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
    write_sample(tmp_path / "bad.safetensors", latents, prompt)
    with pytest.raises(ModelSourceError, match=message) as caught:
        CachedDataset(str(tmp_path))
    assert "\n" not in str(caught.value) and "cache_latents" in str(caught.value)


def test_prompts_of_two_lengths_are_refused_for_a_model_without_a_mask(tmp_path: Path):
    write_sample(tmp_path / "a.safetensors", torch.zeros(4, 1, 4, 4), torch.zeros(3, 16))
    write_sample(tmp_path / "b.safetensors", torch.zeros(4, 1, 4, 4), torch.zeros(4, 16))
    with pytest.raises(
        ModelSourceError, match=r"prompt_embeds has shape \(4, 16\), need \(3, 16\)"
    ):
        fit_dataset(CachedDataset(str(tmp_path)), WAN, WAN_CONFIG)
    write_sample(tmp_path / "b.safetensors", torch.zeros(4, 1, 4, 4))
    with pytest.raises(ModelSourceError, match="b.safetensors: prompt_embeds is missing"):
        fit_dataset(CachedDataset(str(tmp_path)), WAN, WAN_CONFIG)


def test_missing_empty_and_damaged_folders_are_refused(tmp_path: Path):
    with pytest.raises(
        ModelSourceError, match="does not exist; need a folder of .safetensors samples"
    ):
        CachedDataset(str(tmp_path / "nowhere"))
    with pytest.raises(ModelSourceError, match="found 0 .safetensors files, need at least 1"):
        CachedDataset(str(tmp_path))
    path = tmp_path / "a.safetensors"
    write_sample(path, torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
    with pytest.raises(ModelSourceError, match="it is a file"):
        CachedDataset(str(path))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(
            ModelSourceError, match="a.safetensors: not a readable safetensors file"
        ):
            CachedDataset(str(tmp_path))


def test_a_file_that_changes_during_the_run_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_sample(path, torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
    dataset = CachedDataset(str(tmp_path))
    write_sample(path, torch.zeros(2, 1, 8, 2), torch.zeros(3, 5))
    with pytest.raises(
        ModelSourceError, match=r"latents now has shape \(2, 1, 8, 2\), need \(2, 1, 4, 4\)"
    ):
        dataset[0]
    write_sample(path, torch.full((2, 1, 4, 4), float("nan")), torch.zeros(3, 5))
    with pytest.raises(ModelSourceError, match="latents holds NaN or infinity"):
        dataset[0]
    path.unlink()
    with pytest.raises(ModelSourceError, match="not a readable safetensors file"):
        dataset[0]
