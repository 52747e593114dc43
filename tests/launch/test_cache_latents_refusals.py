"""What `cache_latents` resumes, keeps and refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dist_layerlr.errors import ModelSourceError
from launch import cache_latents
from launch.trainer.data.cached import CachedDataset
from tests.support.latents import (
    Models,
    assert_refused,
    run_program,
    write_clips,
    write_image,
    write_images,
)

# Resuming


def test_a_second_run_encodes_only_what_is_missing(
    models: Models, tmp_path: Path, monkeypatch, capsys
):
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    assert run_program(source, output, models.image_vae, models) == 0
    kept, gone = output / "blue.safetensors", output / "red.safetensors"
    stamp = kept.stat().st_mtime_ns
    gone.unlink()
    assert run_program(source, output, models.image_vae, models) == 0
    assert "(1 written now)" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == stamp and gone.exists()

    monkeypatch.setattr(
        cache_latents, "load_text_encoder", lambda *_: pytest.fail("nothing is left to encode")
    )
    assert run_program(source, output, models.image_vae, models) == 0


def test_a_kept_sample_of_other_settings_is_refused_and_overwrite_replaces_it(
    models: Models, tmp_path: Path, capsys
):
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    assert run_program(source, output, models.image_vae, models) == 0
    smaller = ["--height", "8", "--width", "8"]
    assert_refused(
        capsys,
        run_program(source, output, models.image_vae, models, *smaller),
        "latents (F, H, W) (1, 8, 8)",
        "--overwrite",
    )
    assert_refused(
        capsys,
        run_program(source, output, models.image_vae, models, "--dtype", "fp16"),
        "dtype 'F32'",
        "'F16'",
    )
    (source / "red.txt").write_text("a square")
    assert_refused(
        capsys, run_program(source, output, models.image_vae, models), "red.safetensors", "caption"
    )
    assert run_program(source, output, models.image_vae, models, *smaller, "--overwrite") == 0
    assert CachedDataset(str(output)).shapes(0)["latents"] == (4, 1, 4, 4)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(
        ModelSourceError, match="cannot be written .No space left on device.; free space"
    ):
        cache_latents.write_sample(tmp_path / "red.safetensors", {"latents": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


# Bad inputs of the program


def test_every_bad_source_is_one_line_with_status_2(models: Models, tmp_path: Path, capsys):
    def refuse(source: Path, *parts: str) -> None:
        assert_refused(
            capsys, run_program(source, tmp_path / "out", models.image_vae, models), *parts
        )

    refuse(tmp_path / "nowhere", "--input", "nowhere", "not a folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "found 0 images", "need at least 1")
    write_image(tmp_path / "silent" / "cat.png", 0)
    refuse(tmp_path / "silent", "cat.png: no caption", "cat.txt")
    (tmp_path / "hollow" / "clip").mkdir(parents=True)
    refuse(tmp_path / "hollow", "clip: holds 0 frames")
    (write_images(tmp_path / "broken") / "red.png").write_bytes(b"not an image")
    refuse(tmp_path / "broken", "red.png: not a readable image")
    shutil.copy(write_images(tmp_path / "twins") / "red.png", tmp_path / "twins" / "red.webp")
    refuse(tmp_path / "twins", "red.png and red.webp", "rename one")
    (write_images(tmp_path / "latin") / "red.txt").write_bytes(b"caf\xe9")
    refuse(tmp_path / "latin", "red.txt: caption is not UTF-8")
    write_image(write_images(tmp_path / "mixed") / "red.png", 0, (16, 12))
    refuse(tmp_path / "mixed", "red.png: is 16x12", "is 16x16", "--height and --width")
    assert not (tmp_path / "out").exists()


def test_a_truncated_image_is_named_and_earlier_samples_stay(
    models: Models, tmp_path: Path, capsys
):
    source = write_images(tmp_path / "in")
    (source / "red.png").unlink()
    write_image(source / "red.jpg", 1)
    whole = (source / "red.jpg").read_bytes()
    (source / "red.jpg").write_bytes(whole[:-100])
    assert_refused(
        capsys,
        run_program(source, tmp_path / "out", models.image_vae, models),
        "red.jpg: not a readable image",
    )
    # The mark tells the trainer that this is not all.
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["_unfinished.0", "blue.safetensors"]


def test_a_size_that_the_vae_cannot_take_is_refused(models: Models, tmp_path: Path, capsys):
    odd = write_images(tmp_path / "odd", (15, 16))
    assert_refused(
        capsys,
        run_program(odd, tmp_path / "out", models.image_vae, models),
        "--width=15",
        "multiple of 2",
        "--width 14",
    )
    clips = write_clips(tmp_path / "clips", frames=6)
    run = run_program(clips, tmp_path / "out", models.video_vae, models)
    assert_refused(capsys, run, "--frames=6", "4k+1", "--frames 5")
    run = run_program(clips, tmp_path / "out", models.video_vae, models, "--frames", "9")
    assert_refused(capsys, run, "one: has 6 frames", "--frames=9")
    assert run_program(clips, tmp_path / "out", models.video_vae, models, "--frames", "5") == 0


def test_images_and_clips_of_other_lengths_do_not_mix(models: Models, tmp_path: Path, capsys):
    write_clips(write_images(tmp_path / "in"))
    assert_refused(
        capsys,
        run_program(tmp_path / "in", tmp_path / "out", models.image_vae, models),
        "frames",
        "separate folders",
    )


def test_bad_flags_are_one_line_with_status_2(models: Models, tmp_path: Path, capsys):
    for flags, part in (
        (["--frames", "0"], "--frames"),
        (["--height", "16"], "--width=None"),
        (["--dtype", "int8"], "int8"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_program(tmp_path, tmp_path / "out", models.image_vae, models, *flags)
        assert_refused(capsys, stop.value.code, part)


def test_bad_model_folders_are_one_line_with_status_2(models: Models, tmp_path: Path, capsys):
    source, output = write_images(tmp_path / "in"), tmp_path / "out"
    assert_refused(capsys, run_program(source, output, tmp_path, models), "--vae", "no config.json")
    assert_refused(
        capsys,
        run_program(source, output, models.text_encoder, models),
        "--vae",
        "class None",
        "AutoencoderKLWan",
    )
    broken = shutil.copytree(models.image_vae, tmp_path / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert_refused(
        capsys,
        run_program(source, output, broken, models),
        "--vae",
        "AutoencoderKL cannot be loaded",
    )
    flags = ["--text-encoder", str(models.image_vae)]
    assert_refused(
        capsys,
        run_program(
            source, output, models.image_vae, models, *flags, "--tokenizer", str(models.tokenizer)
        ),
        "None",
    )
    flags = ["--tokenizer", str(models.image_vae)]
    assert_refused(
        capsys,
        run_program(source, output, models.image_vae, models, *flags),
        "--tokenizer",
        "cannot be loaded",
    )


def test_a_text_encoder_that_is_not_an_encoder_or_lacks_weights_is_refused(
    models: Models, tmp_path: Path
):
    folder = shutil.copytree(models.text_encoder, tmp_path / "text_encoder")
    tensors = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {
            key: file.get_tensor(key) for key in file.keys() if "final_layer_norm" not in key
        }  # noqa: SIM118
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelSourceError,
        match="1 weights of UMT5EncoderModel missing, first encoder.final_layer_norm",
    ):
        cache_latents.load_text_encoder(folder, torch.float32, "cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(ModelSourceError, match="LlamaForCausalLM; need an encoder-only class"):
        cache_latents.load_text_encoder(folder, torch.float32, "cpu")


def test_latents_that_overflow_are_refused(models: Models):
    vae = cache_latents.load_vae(models.image_vae, torch.float32, "cpu")
    with pytest.raises(ModelSourceError, match="AutoencoderKL gave NaN or infinity"):
        cache_latents.encode_latents(
            vae, cache_latents.vae_layout(vae), torch.full((3, 1, 16, 16), float("inf"))
        )
