"""Latents and prompt embeddings written by `cache_latents` and read back by `CachedDataset`.

The models are tiny random instances of the real classes, saved to disk once for the whole file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch import cache_latents
from launch.trainer.data.cached import CachedDataset, read_header
from launch.trainer.data.images import image_size
from tests.support.latents import (
    WAN_MEAN,
    WAN_STD,
    Models,
    run_program,
    write_clips,
    write_image,
    write_images,
)

pytest.importorskip("diffusers", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the train extra")


# Encoding


def test_images_become_normalised_latents_that_the_dataset_reads_back(
    models: Models, tmp_path: Path, capsys
):
    from diffusers import AutoencoderKL

    source = write_images(tmp_path / "in")
    assert run_program(source, tmp_path / "out", models.image_vae, models) == 0
    dataset = CachedDataset(str(tmp_path / "out"))
    assert len(dataset) == 2
    assert dataset.shapes(0) == {"latents": (4, 1, 8, 8), "prompt_embeds": (6, 8)}
    assert [dataset.name(0), dataset.name(1)] == ["a blue square", "a red square moves left"]

    vae = AutoencoderKL.from_pretrained(models.image_vae)
    with Image.open(source / "red.png") as image:
        pixels = (
            torch.tensor(list(image.tobytes()), dtype=torch.float32)
            .view(16, 16, 3)
            .permute(2, 0, 1)
        )
    with torch.no_grad():
        raw = vae.encode((pixels / 127.5 - 1)[None]).latent_dist.mode()
    expected = ((raw - 0.1159) * 0.3611).transpose(0, 1)
    torch.testing.assert_close(dataset[1]["latents"], expected)
    shown = capsys.readouterr().out
    assert "2 samples" in shown and "(4, 1, 8, 8)" in shown and "--set data.kind=cached" in shown


def test_a_cache_that_was_cut_off_is_refused_until_it_is_whole(models: Models, tmp_path: Path):
    source, out = write_clips(tmp_path / "in"), tmp_path / "out"
    write = cache_latents.write_sample

    def killed(path: Path, *rest: Any) -> None:
        write(path, *rest)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_latents, "write_sample", killed)
        with pytest.raises(KeyboardInterrupt):
            run_program(source, out, models.video_vae, models)
    refused = "it is not complete, 1 samples are there and the program that writes them did not end"
    with pytest.raises(ModelSourceError, match=refused):
        CachedDataset(str(out))
    assert run_program(source, out, models.video_vae, models) == 0
    assert len(CachedDataset(str(out))) == 2 and not list(out.glob("_unfinished*"))
    # One that was killed between its last sample and its end has nothing left to write.
    (out / "_unfinished.3").touch()
    assert run_program(source, out, models.video_vae, models) == 0
    assert len(CachedDataset(str(out))) == 2


def test_clips_become_wan_latents_normalised_per_channel(models: Models, tmp_path: Path):
    from diffusers import AutoencoderKLWan

    source = write_clips(tmp_path / "in")
    assert run_program(source, tmp_path / "out", models.video_vae, models) == 0
    dataset = CachedDataset(str(tmp_path / "out"))
    assert dataset.shapes(1)["latents"] == (4, 2, 4, 4)

    clip = cache_latents.load_clip([source / "one" / f"{frame}.png" for frame in range(5)], 16, 16)
    with torch.no_grad():
        raw = (
            AutoencoderKLWan.from_pretrained(models.video_vae)
            .encode(clip[None])
            .latent_dist.mode()[0]
        )
    mean, std = (torch.tensor(values).view(4, 1, 1, 1) for values in (WAN_MEAN, WAN_STD))
    torch.testing.assert_close(dataset[0]["latents"], (raw - mean) / std)


def test_an_image_vae_encodes_a_clip_frame_by_frame(models: Models, tmp_path: Path):
    source = write_clips(tmp_path / "in", frames=3)
    vae = cache_latents.load_vae(models.image_vae, torch.float32, "cpu")
    layout = cache_latents.vae_layout(vae)
    frames = [source / "one" / f"{frame}.png" for frame in range(3)]
    whole = cache_latents.encode_latents(vae, layout, cache_latents.load_clip(frames, 16, 16))
    last = cache_latents.encode_latents(vae, layout, cache_latents.load_clip(frames[2:], 16, 16))
    assert whole.shape == (4, 3, 8, 8)
    torch.testing.assert_close(whole[:, 2:], last)


def test_padding_is_zero_and_the_caption_matches_a_direct_call(models: Models):
    from transformers import UMT5EncoderModel

    encoder = cache_latents.load_text_encoder(models.text_encoder, torch.float32, "cpu")
    tokenizer = cache_latents.load_tokenizer(cache_latents.find_tokenizer(models.text_encoder))
    found = cache_latents.encode_caption(encoder, tokenizer, "a red square", 6)
    with torch.no_grad():
        direct = UMT5EncoderModel.from_pretrained(models.text_encoder)(
            torch.tensor([[2, 3, 5]])
        ).last_hidden_state[0]
    torch.testing.assert_close(found[:3], direct)
    assert bool((found[:3] != 0).any(1).all()) and bool((found[3:] == 0).all())


def test_a_caption_longer_than_max_tokens_is_cut(models: Models):
    encoder = cache_latents.load_text_encoder(models.text_encoder, torch.float32, "cpu")
    tokenizer = cache_latents.load_tokenizer(models.tokenizer)
    found = cache_latents.encode_caption(encoder, tokenizer, "a red square moves left", 2)
    torch.testing.assert_close(found, cache_latents.encode_caption(encoder, tokenizer, "a red", 2))


def test_cut_captions_are_counted_in_one_line_on_stderr(models: Models, tmp_path: Path, capsys):
    source = write_images(tmp_path / "in")
    assert run_program(source, tmp_path / "out", models.image_vae, models, "--max-tokens", "3") == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "sample" not in text]
    assert (
        line.startswith("cache_latents: warning: ")
        and "--max-tokens=3" in line
        and "red.png" in line
    )
    assert line.endswith(": 1 cut")
    assert run_program(source, tmp_path / "fits", models.image_vae, models) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("program", ["cache_latents", "train", "make_tiny_wan"])
def test_a_checkout_that_is_not_installed_says_what_to_install(tmp_path: Path, program: str):
    script = Path(cache_latents.__file__).with_name(f"{program}.py")
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S: without site-packages, so that neither the project nor torch is found.
    shown = subprocess.run(
        [sys.executable, "-S", script, "--help"],
        cwd=tmp_path,
        env=bare,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.startswith(program) and shown.stderr.count("\n") == 1
    assert 'Run: pip install -e ".[train]"' in shown.stderr


def test_the_program_shows_its_flags(tmp_path: Path):
    shown = subprocess.run(
        [sys.executable, cache_latents.__file__, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and "--max-tokens" in shown.stdout, shown.stderr


def test_a_clip_text_encoder_keeps_its_padding_and_limits_max_tokens(
    models: Models, tmp_path: Path
):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=7,
        eos_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(tmp_path)
    encoder = cache_latents.load_text_encoder(tmp_path, torch.float32, "cpu")
    found = cache_latents.encode_caption(
        encoder, cache_latents.load_tokenizer(models.tokenizer), "a red square", 6
    )
    assert bool((found != 0).any(1).all())
    cache_latents.check_tokens(7, encoder)
    with pytest.raises(ConfigError, match=r"--max-tokens=8: must be in \[1, 7\]"):
        cache_latents.check_tokens(8, encoder)


def test_two_runs_write_the_same_bits(models: Models, tmp_path: Path):
    source = write_images(tmp_path / "in")
    for name in ("first", "second"):
        assert (
            run_program(source, tmp_path / name, models.image_vae, models, "--dtype", "bf16") == 0
        )
    first, second = (CachedDataset(str(tmp_path / run)) for run in ("first", "second"))
    assert all(
        torch.equal(first[i][field], second[i][field]) for i in range(2) for field in first[i]
    )
    assert first[0]["latents"].dtype == torch.float32
    assert set(read_header(tmp_path / "first" / "red.safetensors").dtypes.values()) == {"BF16"}


def test_metadata_names_caption_source_and_models(models: Models, tmp_path: Path):
    assert (
        run_program(write_clips(tmp_path / "in"), tmp_path / "out", models.video_vae, models) == 0
    )
    with safe_open(tmp_path / "out" / "two.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "caption": "a blue square moves right",
        "source": "two",
        "vae": str(models.video_vae),
        "text_encoder": str(models.text_encoder),
    }


def test_height_and_width_scale_to_cover_and_crop_the_centre(tmp_path: Path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (10, 0, 30, 20))
    image.save(tmp_path / "wide.png")
    clip = cache_latents.load_clip([tmp_path / "wide.png"], 20, 20)
    assert clip.shape == (3, 1, 20, 20) and bool((clip == 1).all())


def test_a_turned_photo_is_measured_and_loaded_as_shown(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (8, 4)
    assert cache_latents.load_clip([tmp_path / "turned.jpg"], 8, 4).shape == (3, 1, 8, 4)


def test_frames_are_ordered_by_number(tmp_path: Path):
    for frame in (10, 9, 1):
        write_image(tmp_path / "clip" / f"frame{frame}.png", frame)
    (tmp_path / "clip.txt").write_text("a square")
    (sample,) = cache_latents.find_samples(tmp_path)
    assert [path.stem for path in sample.frames] == ["frame1", "frame9", "frame10"]
