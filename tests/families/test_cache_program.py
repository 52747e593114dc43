"""``cache_latents --model``: samples of every family, encoded as its own pipeline does it."""

from __future__ import annotations

import json
import wave
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from launch import cache_latents
from launch.trainer.data import caching, fit_dataset
from launch.trainer.data.cached import CachedDataset, read_header
from launch.trainer.data.clips import load_placed
from launch.trainer.data.order import buckets_of
from launch.trainer.data.sizes import place
from launch.trainer.data.sources import gather
from launch.trainer.families import FAMILIES, get_family
from launch.trainer.families.diffusion import Diffusion, Origin
from launch.trainer.tiny import build, known
from tests.support.latents import write_image

PIPELINES = [name for name, module in known().items() if not hasattr(module, "FOLDERS")]
CLIPS = ("wan", "wan22", "hunyuan_video", "ltx2")
"""Beginnings of the families whose samples are clips."""
CAPTIONS = ("A red cat", "dogs", "a very long road to the sea", "cat", "", "two mats, 3 cats")
SIZES = ((64, 32), (32, 64))
"""Width and height of the pictures, in turns."""
BUCKETS = ("--pixels", "2048", "--step", "32")


def type_of(name: str) -> str:
    """The model type of a tiny pipeline; those of variants begin with it."""
    return name if name in FAMILIES else name.partition("_")[0]


def family_of(name: str) -> Diffusion:
    family = get_family(type_of(name))
    assert isinstance(family, Diffusion)
    return family


@cache
def tiny(name: str) -> Any:
    import diffusers

    diffusers.logging.set_verbosity_error()
    return build(name)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, caption in enumerate(CAPTIONS):
        write_image(folder / f"{i}.png", i, SIZES[i % 2])
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i, caption in enumerate(CAPTIONS):
        for frame in range(10):
            write_image(folder / str(i) / f"{frame}.png", 100 * i + frame, SIZES[i % 2])
        (folder / str(i) / "caption.txt").write_text(caption)
    return folder


def model_folder(name: str, root: Path) -> Path:
    folder = root / name
    if not folder.exists():
        tiny(name).save_pretrained(folder)
    return folder


def flags_of(name: str, source: Path, output: Path, model: Path) -> list[str]:
    paths = {"--model": model, "--input": source, "--output": output}
    given = [str(part) for pair in paths.items() for part in pair]
    return [*given, "--model-type", type_of(name)]


@pytest.mark.parametrize("name", PIPELINES)
def test_six_samples_of_two_sizes_are_what_the_pipeline_makes_of_them(
    name: str, pictures: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    family, pipeline, is_clip = family_of(name), tiny(name), name.startswith(CLIPS)
    source, output = clips if is_clip else pictures, tmp_path / "out"
    model = model_folder(name, tmp_path)
    flags = flags_of(name, source, output, model)
    status = cache_latents.main([*flags, *BUCKETS, "--fps", "24"])
    if name.endswith("_i2v") and find_spec("ftfy") is None:
        # This pipeline of diffusers calls the package whether it is installed or not.
        assert status == 2 and "'ftfy' is not defined; pip install ftfy." in capsys.readouterr().err
        return
    assert status == 0

    data = CachedDataset(str(output))
    config = json.loads((model / family.subfolder / "config.json").read_text())
    fit_dataset(data, family, config)
    assert [data.name(i) or "4" for i in range(6)] == [c or "4.safetensors" for c in CAPTIONS]
    assert buckets_of(data) == ((0, 2, 4), (1, 3, 5))
    for members in buckets_of(data):
        family.collate([data[i] for i in members])
    for i in (1, 2):
        sample = gather(source).samples[i]
        placement = place(SIZES[i % 2][::-1], SIZES[i % 2][::-1])
        # 10 frames: 9 are the most that the VAEs take, which begin with one and go on in fours
        # or eights.
        pixels = load_placed(sample, placement, 9 if is_clip else 1)
        origin = Origin(size=placement.original, corner=(0, 0), fps=24.0 if is_clip else None)
        with torch.no_grad():
            expected = {
                **family.encode_source(pipeline, pixels, origin),
                **family.encode_prompt(pipeline, CAPTIONS[i]),
            }
        found = data[i]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=0)
    with torch.no_grad():
        empty = family.encode_prompt(pipeline, "")
    found = data.empty_prompt()
    assert found is not None and found.keys() == empty.keys() == set(family.prompt_fields)
    assert all(torch.equal(found[key], value) for key, value in empty.items())
    assert sorted(path.name for path in output.iterdir() if path.name.startswith((".", "s"))) == []


def test_sdxl_is_told_the_file_s_size_and_the_crop(tmp_path: Path):
    write_image(tmp_path / "in" / "wide.png", 0, (100, 40))
    (tmp_path / "in" / "wide.txt").write_text("a road")
    flags = flags_of("sdxl", tmp_path / "in", tmp_path / "out", model_folder("sdxl", tmp_path))
    assert cache_latents.main([*flags, "--pixels", "2048", "--step", "16"]) == 0
    sample = CachedDataset(str(tmp_path / "out"))[0]
    # Of the ratios 1 : 2 and 1 : 8 the nearest to 1 : 2.5 is the first. A height of 32
    # scales the width to 80, of which 8 go on each side.
    assert sample["time_ids"].tolist() == [40, 100, 0, 8, 32, 64]
    assert sample["latents"].shape == (4, 16, 32)


def test_a_picture_is_scaled_to_cover_its_bucket_and_cropped_at_the_centre(tmp_path: Path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    image.save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("")
    (sample,) = gather(tmp_path).samples
    pixels = load_placed(sample, place((20, 40), (20, 20)), 1)
    assert pixels.shape == (3, 1, 20, 20) and bool((pixels == 1).all())


# Going on, sharing out, leaving out


def run_sdxl(source: Path, output: Path, *more: str) -> int:
    model = model_folder("sdxl", source.parent)
    return cache_latents.main([*flags_of("sdxl", source, output, model), *BUCKETS, *more])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for i, name in enumerate(("a", "b", "cats/c", "cats/d")):
        write_image(folder / f"{name}.png", i, SIZES[i % 2])
        (folder / f"{name}.txt").write_text(f"cat {i}")
    return folder


def test_a_second_call_encodes_what_is_missing_and_loads_no_text_encoder_for_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "out"
    assert run_sdxl(source, output) == 0
    assert "4 samples" in (said := capsys.readouterr().out) and "(4 written now)" in said
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    real = caching.load_parts

    def no_text(folder: Path, parts: Any, *others: Any) -> Any:
        assert parts != caching.TEXT_PARTS, "nothing is left to encode"
        return real(folder, parts, *others)

    with monkeypatch.context() as patch:
        patch.setattr(caching, "load_parts", no_text)
        assert run_sdxl(source, output) == 0
    assert "(0 written now)" in capsys.readouterr().out
    (output / "cats" / "d.safetensors").unlink()
    assert run_sdxl(source, output) == 0
    assert "(1 written now)" in capsys.readouterr().out
    now = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    assert now.keys() == kept.keys()
    assert [path.name for path in kept if now[path] != kept[path]] == ["d.safetensors"]


def test_a_run_that_was_cut_off_between_captions_and_pictures_keeps_the_captions(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output, family = tmp_path / "out", type(family_of("sdxl"))

    def gone(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(family, "encode_source", gone)
        with pytest.raises(KeyboardInterrupt):
            run_sdxl(source, output)
    assert len(list((output / caching.PROMPTS).rglob("*.prompt"))) == 4
    # No run trains on such a folder.
    assert (output / "_unfinished.0").exists()
    # One caption is another by now.
    (source / "b.txt").write_text("dog")
    asked: list[str] = []
    real = family.encode_prompt

    def noted(self: Any, pipeline: Any, caption: str) -> Any:
        asked.append(caption)
        return real(self, pipeline, caption)

    monkeypatch.setattr(family, "encode_prompt", noted)
    assert run_sdxl(source, output) == 0
    assert asked == ["dog"] and not (output / "_unfinished.0").exists()
    data = CachedDataset(str(output))
    assert [data.name(i) for i in range(4)] == ["cat 0", "dog", "cat 2", "cat 3"]
    with torch.no_grad():
        expected = real(family(), tiny("sdxl"), "dog")["prompt_embeds"]
    assert torch.equal(data[1]["prompt_embeds"], expected)


def test_shards_write_together_what_one_process_writes(source: Path, tmp_path: Path):
    assert run_sdxl(source, tmp_path / "one") == 0
    for shard in ("1/2", "0/2"):
        assert run_sdxl(source, tmp_path / "two", "--shard", shard) == 0
    one, two = (CachedDataset(str(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for i in range(4):
        assert all(torch.equal(value, two[i][key]) for key, value in one[i].items())
    assert two.empty_prompt() is not None


def test_torchrun_s_rank_is_the_shard(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for rank, count in ((1, 1), (5, 0)):  # of 6 processes and 4 samples
        for key, value in {"RANK": rank, "WORLD_SIZE": 6, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(key, str(value))
        assert run_sdxl(source, tmp_path / "out") == 0
        assert f"{count} samples written by process {rank} of 6" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").rglob("*.safetensors")] == ["b.safetensors"]


def test_what_cannot_be_encoded_is_listed_with_its_reason(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_image(source / "silent.png", 0)
    (source / "broken.png").write_bytes(b"no image")
    (source / "broken.txt").write_text("x")
    whole = source / "half.jpg"
    write_image(whole, 1)
    whole.write_bytes(whole.read_bytes()[:-100])
    (source / "half.txt").write_text("x")
    (source / "alone.txt").write_text("x")
    (source / "notes.pdf").write_bytes(b"%PDF")
    write_image(source / "a.webp", 2)
    write_image(source / "_empty_prompt.png", 2)
    for frame in range(2):
        write_image(source / "clip" / f"{frame}.png", frame)
    (source / "clip" / "caption.txt").write_text("x")
    (source / ".hidden.png").write_bytes(b"")
    assert run_sdxl(source, tmp_path / "out") == 0
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    reasons = {
        "_empty_prompt.png": "is the empty prompt's file; rename it",
        "a.webp": "would be written to a.safetensors like a.png; rename one of them",
        "alone.txt": "a caption without an image, video or folder of its name",
        "broken.png": "not a readable image",
        "clip": "2 frames, and this model makes images",
        "half.jpg": "not a readable image",
        "notes.pdf": ".pdf: neither an image nor a video",
        "silent.png": "no caption; write one to",
    }
    assert sorted(line.partition(": ")[0] for line in lines) == sorted(reasons)
    for name, reason in reasons.items():
        assert any(line.startswith(f"{name}: ") and reason in line for line in lines), name
    assert "warning: skipped 8 files" in capsys.readouterr().err
    assert len(CachedDataset(str(tmp_path / "out"))) == 4


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--dtype", "bf16"], ("dtype 'fp32'", "'bf16'", "--overwrite")),
        (["--pixels", "1024"], ("pixels '1 x 32 x 64'", "'1 x 32 x 32'", "--overwrite")),
        (["--step", "3"], ("--step=3", "multiple of 2")),
        (["--pixels", "100"], ("--pixels=100", "at least 1024")),
        (["--pixels", "9", "--height", "8", "--width", "8"], ("--pixels makes buckets",)),
        (["--height", "9", "--width", "8"], ("--height=9", "multiple of 2")),
        (["--shard", "2/2"], ("'2/2' is not I/N",)),
        (["--vae", "x", "--text-encoder", "y"], ("either --model and --model-type or",)),
        (["--max-tokens", "7"], ("--max-tokens does not go with --model",)),
        (["--model-type", "sd15"], ("addition_embed_type", "set model_type to sdxl")),
        (["--model-type", "sdxxl"], ("model_type='sdxxl'", "Did you mean 'sdxl'?")),
        (["--model", "nowhere"], ("--model 'nowhere'", "no model_index.json there")),
        (["--input", "nowhere"], ("--input 'nowhere'", "not a folder")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_in_one_line(
    more: list[str], parts: tuple[str, ...], wide: Path, capsys: pytest.CaptureFixture[str]
):
    flags = flags_of("sdxl", wide, wide.parent / "out", wide.parent / "sdxl")
    buckets = [] if "--height" in more and "--pixels" not in more else list(BUCKETS)
    try:
        status = cache_latents.main([*flags, *buckets, *more])
    except SystemExit as stop:
        status = int(stop.code or 0)
    lines = [line for line in capsys.readouterr().err.splitlines() if "sample" not in line]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("cache_latents: error: "), lines
    assert [part for part in parts if part not in lines[0]] == [], lines


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture, and its cache beside it."""
    root = tmp_path_factory.mktemp("wide")
    write_image(root / "in" / "a.png", 0, (64, 32))
    (root / "in" / "a.txt").write_text("a cat")
    assert run_sdxl(root / "in", root / "out") == 0
    return root / "in"


def test_captions_and_pictures_that_were_changed_are_counted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (source / "a.txt").write_text("word " * 100)
    write_image(source / "b.png", 5, (20, 40))
    assert run_sdxl(source, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert (
        "captions longer than the pipeline takes were cut, first that of a.png by tokenizer" in said
    )
    assert ": 2 cut" in said  # by both tokenizers
    assert "smaller than --pixels were enlarged, first b.png: 1 enlarged" in said


def test_only_sizes_keep_their_precision_in_a_cache_of_16_bits(source: Path, tmp_path: Path):
    write_image(source / "a.png", 5, (1027, 513))
    assert run_sdxl(source, tmp_path / "out", "--dtype", "bf16") == 0
    kinds = read_header(tmp_path / "out" / "a.safetensors").dtypes
    assert kinds == {
        **dict.fromkeys(("latents", "pooled", "prompt_embeds"), "BF16"),
        "time_ids": "F32",
    }
    assert CachedDataset(str(tmp_path / "out"))[0]["time_ids"][:2].tolist() == [513, 1027]


def test_the_sound_beside_a_clip_is_encoded_with_it(tmp_path: Path):
    for name in ("loud", "silent"):
        for frame in range(9):
            write_image(tmp_path / "in" / name / f"{frame}.png", frame, SIZES[0])
        (tmp_path / "in" / f"{name}.txt").write_text("a cat")
    noise = torch.randint(-9000, 9000, (16_000, 2), generator=torch.Generator().manual_seed(0))
    with wave.open(str(tmp_path / "in" / "loud.wav"), "wb") as file:
        file.setparams((2, 2, 16_000, 0, "NONE", ""))
        file.writeframes(noise.to(torch.int16).numpy().tobytes())
    flags = flags_of("ltx2", tmp_path / "in", tmp_path / "out", model_folder("ltx2", tmp_path))
    assert cache_latents.main([*flags, *BUCKETS, "--fps", "24"]) == 0
    loud, silent = CachedDataset(str(tmp_path / "out"))
    assert loud["has_audio"].tolist() is True and silent["has_audio"].tolist() is False
    origin = Origin(size=(32, 64), corner=(0, 0), fps=24.0, sound=noise.T / 2.0**15, rate=16_000)
    (sample, _) = gather(tmp_path / "in").samples
    pixels = load_placed(sample, place((32, 64), (32, 64)), 9)
    with torch.no_grad():
        expected = family_of("ltx2").encode_source(tiny("ltx2"), pixels, origin)
    assert torch.equal(loud["audio_latents"], expected["audio_latents"])
    assert not torch.equal(loud["audio_latents"], silent["audio_latents"])


def test_clips_without_a_rate_are_skipped_by_a_model_that_is_told_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for frame in range(9):
        write_image(tmp_path / "in" / "clip" / f"{frame}.png", frame, SIZES[0])
    (tmp_path / "in" / "clip.txt").write_text("a cat")
    flags = flags_of("ltx2", tmp_path / "in", tmp_path / "out", model_folder("ltx2", tmp_path))
    assert cache_latents.main([*flags, *BUCKETS]) == 2
    said = capsys.readouterr().err
    assert "None of 1 samples can be encoded; clip: A clip does not say how many frames" in said
