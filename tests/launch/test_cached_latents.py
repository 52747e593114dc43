"""Latents and prompt embeddings written by `cache_latents` and read back by `CachedDataset`.

The models are tiny random instances of the real classes, saved to disk once for the whole file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers", reason="needs the train extra")
pytest.importorskip("transformers", reason="needs the train extra")

from dist_layerlr.errors import ConfigError, ModelSourceError
from launch import cache_latents
from launch.trainer.data.cached import CachedDataset, read_header
from launch.trainer.data.images import image_size

WORDS = ["a", "red", "blue", "square", "moves", "left", "right"]
WAN_MEAN, WAN_STD = [0.5, -1.0, 0.25, 2.0], [2.0, 0.5, 4.0, 1.5]


@dataclass(frozen=True, kw_only=True)
class Models:
    """Folders of the saved models."""

    image_vae: Path
    video_vae: Path
    text_encoder: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tiny random models: image VAE 2x smaller; video VAE 4x smaller in space and in time; 8-wide
    text encoder."""
    from diffusers import AutoencoderKL, AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    image_vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    video_vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=WAN_MEAN,
        latents_std=WAN_STD,
    )
    text = UMT5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    found = Models(
        image_vae=root / "image_vae",
        video_vae=root / "video_vae",
        text_encoder=root / "text_encoder",
        tokenizer=root / "tokenizer",
    )
    image_vae.save_pretrained(found.image_vae)
    video_vae.save_pretrained(found.video_vae)
    UMT5EncoderModel(text).save_pretrained(found.text_encoder)
    _tokenizer().save_pretrained(found.tokenizer)
    return found


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def _image(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.randint(
        0, 256, (size[0] * size[1] * 3,), generator=torch.Generator().manual_seed(seed)
    )
    Image.frombytes("RGB", size, bytes(noise.tolist())).save(path)


def _images(folder: Path, size: tuple[int, int] = (16, 16)) -> Path:
    for seed, (name, caption) in enumerate(
        {"blue": "a blue  square\n", "red": "a red square moves left"}.items()
    ):
        _image(folder / f"{name}.png", seed, size)
        (folder / f"{name}.txt").write_text(caption)
    return folder


def _clips(folder: Path, frames: int = 5) -> Path:
    for seed, name in enumerate(["one", "two"]):
        for frame in range(frames):
            _image(folder / name / f"{frame}.png", 100 * seed + frame)
    (folder / "one" / "caption.txt").write_text("a red square")
    (folder / "two.txt").write_text("a blue square moves right")
    return folder


def _run(source: Path, output: Path, vae: Path, models: Models, *extra: str) -> int:
    flags = [
        "--input",
        source,
        "--output",
        output,
        "--vae",
        vae,
        "--text-encoder",
        models.text_encoder,
    ]
    return cache_latents.main([*map(str, flags), "--max-tokens", "6", *extra])


def _write(
    path: Path, latents: Tensor | None = None, prompt: Tensor | None = None, **metadata: str
) -> None:
    tensors = {"latents": latents, "prompt_embeds": prompt}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor for key, tensor in tensors.items() if tensor is not None},
        path,
        metadata=metadata,
    )


def _refused(capsys: pytest.CaptureFixture[str], status: int, *parts: str) -> None:
    """One line on stderr with every part, and status 2."""
    lines = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("cache_latents: error: "), lines
    assert [part for part in parts if part not in lines[0]] == []


# Encoding


def test_images_become_normalised_latents_that_the_dataset_reads_back(
    models: Models, tmp_path: Path, capsys
):
    from diffusers import AutoencoderKL

    source = _images(tmp_path / "in")
    assert _run(source, tmp_path / "out", models.image_vae, models) == 0
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


def test_clips_become_wan_latents_normalised_per_channel(models: Models, tmp_path: Path):
    from diffusers import AutoencoderKLWan

    source = _clips(tmp_path / "in")
    assert _run(source, tmp_path / "out", models.video_vae, models) == 0
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
    source = _clips(tmp_path / "in", frames=3)
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
    source = _images(tmp_path / "in")
    assert _run(source, tmp_path / "out", models.image_vae, models, "--max-tokens", "3") == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "sample" not in text]
    assert (
        line.startswith("cache_latents: warning: ")
        and "--max-tokens=3" in line
        and "red.png" in line
    )
    assert line.endswith(": 1 cut")
    assert _run(source, tmp_path / "fits", models.image_vae, models) == 0
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
    source = _images(tmp_path / "in")
    for name in ("first", "second"):
        assert _run(source, tmp_path / name, models.image_vae, models, "--dtype", "bf16") == 0
    first, second = (CachedDataset(str(tmp_path / run)) for run in ("first", "second"))
    assert all(
        torch.equal(first[i][field], second[i][field]) for i in range(2) for field in first[i]
    )
    assert first[0]["latents"].dtype == torch.float32
    assert set(read_header(tmp_path / "first" / "red.safetensors").dtypes.values()) == {"BF16"}


def test_metadata_names_caption_source_and_models(models: Models, tmp_path: Path):
    assert _run(_clips(tmp_path / "in"), tmp_path / "out", models.video_vae, models) == 0
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
        _image(tmp_path / "clip" / f"frame{frame}.png", frame)
    (tmp_path / "clip.txt").write_text("a square")
    (sample,) = cache_latents.find_samples(tmp_path)
    assert [path.stem for path in sample.frames] == ["frame1", "frame9", "frame10"]


# Resuming


def test_a_second_run_encodes_only_what_is_missing(
    models: Models, tmp_path: Path, monkeypatch, capsys
):
    source, output = _images(tmp_path / "in"), tmp_path / "out"
    assert _run(source, output, models.image_vae, models) == 0
    kept, gone = output / "blue.safetensors", output / "red.safetensors"
    stamp = kept.stat().st_mtime_ns
    gone.unlink()
    assert _run(source, output, models.image_vae, models) == 0
    assert "(1 written now)" in capsys.readouterr().out
    assert kept.stat().st_mtime_ns == stamp and gone.exists()

    monkeypatch.setattr(
        cache_latents, "load_text_encoder", lambda *_: pytest.fail("nothing is left to encode")
    )
    assert _run(source, output, models.image_vae, models) == 0


def test_a_kept_sample_of_other_settings_is_refused_and_overwrite_replaces_it(
    models: Models, tmp_path: Path, capsys
):
    source, output = _images(tmp_path / "in"), tmp_path / "out"
    assert _run(source, output, models.image_vae, models) == 0
    smaller = ["--height", "8", "--width", "8"]
    _refused(
        capsys,
        _run(source, output, models.image_vae, models, *smaller),
        "latents (F, H, W) (1, 8, 8)",
        "--overwrite",
    )
    _refused(
        capsys,
        _run(source, output, models.image_vae, models, "--dtype", "fp16"),
        "dtype 'F32'",
        "'F16'",
    )
    (source / "red.txt").write_text("a square")
    _refused(capsys, _run(source, output, models.image_vae, models), "red.safetensors", "caption")
    assert _run(source, output, models.image_vae, models, *smaller, "--overwrite") == 0
    assert CachedDataset(str(output)).shapes(0)["latents"] == (4, 1, 4, 4)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(cache_latents.os, "replace", full_disk)
    with pytest.raises(
        ModelSourceError, match="cannot be written .No space left on device.; free space"
    ):
        cache_latents.write_sample(tmp_path / "red.safetensors", {"latents": torch.zeros(1)}, {})
    assert list(tmp_path.iterdir()) == []


# Bad inputs of the program


def test_every_bad_source_is_one_line_with_status_2(models: Models, tmp_path: Path, capsys):
    def refuse(source: Path, *parts: str) -> None:
        _refused(capsys, _run(source, tmp_path / "out", models.image_vae, models), *parts)

    refuse(tmp_path / "nowhere", "--input", "nowhere", "not a folder")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "found 0 images", "need at least 1")
    _image(tmp_path / "silent" / "cat.png", 0)
    refuse(tmp_path / "silent", "cat.png: no caption", "cat.txt")
    (tmp_path / "hollow" / "clip").mkdir(parents=True)
    refuse(tmp_path / "hollow", "clip: holds 0 frames")
    (_images(tmp_path / "broken") / "red.png").write_bytes(b"not an image")
    refuse(tmp_path / "broken", "red.png: not a readable image")
    shutil.copy(_images(tmp_path / "twins") / "red.png", tmp_path / "twins" / "red.webp")
    refuse(tmp_path / "twins", "red.png and red.webp", "rename one")
    (_images(tmp_path / "latin") / "red.txt").write_bytes(b"caf\xe9")
    refuse(tmp_path / "latin", "red.txt: caption is not UTF-8")
    _image(_images(tmp_path / "mixed") / "red.png", 0, (16, 12))
    refuse(tmp_path / "mixed", "red.png: is 16x12", "is 16x16", "--height and --width")
    assert not (tmp_path / "out").exists()


def test_a_truncated_image_is_named_and_earlier_samples_stay(
    models: Models, tmp_path: Path, capsys
):
    source = _images(tmp_path / "in")
    (source / "red.png").unlink()
    _image(source / "red.jpg", 1)
    whole = (source / "red.jpg").read_bytes()
    (source / "red.jpg").write_bytes(whole[:-100])
    _refused(
        capsys,
        _run(source, tmp_path / "out", models.image_vae, models),
        "red.jpg: not a readable image",
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["blue.safetensors"]


def test_a_size_that_the_vae_cannot_take_is_refused(models: Models, tmp_path: Path, capsys):
    odd = _images(tmp_path / "odd", (15, 16))
    _refused(
        capsys,
        _run(odd, tmp_path / "out", models.image_vae, models),
        "--width=15",
        "multiple of 2",
        "--width 14",
    )
    clips = _clips(tmp_path / "clips", frames=6)
    run = _run(clips, tmp_path / "out", models.video_vae, models)
    _refused(capsys, run, "--frames=6", "4k+1", "--frames 5")
    run = _run(clips, tmp_path / "out", models.video_vae, models, "--frames", "9")
    _refused(capsys, run, "one: has 6 frames", "--frames=9")
    assert _run(clips, tmp_path / "out", models.video_vae, models, "--frames", "5") == 0


def test_images_and_clips_of_other_lengths_do_not_mix(models: Models, tmp_path: Path, capsys):
    _clips(_images(tmp_path / "in"))
    _refused(
        capsys,
        _run(tmp_path / "in", tmp_path / "out", models.image_vae, models),
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
            _run(tmp_path, tmp_path / "out", models.image_vae, models, *flags)
        _refused(capsys, stop.value.code, part)


def test_bad_model_folders_are_one_line_with_status_2(models: Models, tmp_path: Path, capsys):
    source, output = _images(tmp_path / "in"), tmp_path / "out"
    _refused(capsys, _run(source, output, tmp_path, models), "--vae", "no config.json")
    _refused(
        capsys,
        _run(source, output, models.text_encoder, models),
        "--vae",
        "class None",
        "AutoencoderKLWan",
    )
    broken = shutil.copytree(models.image_vae, tmp_path / "broken")
    weights = broken / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    _refused(
        capsys, _run(source, output, broken, models), "--vae", "AutoencoderKL cannot be loaded"
    )
    flags = ["--text-encoder", str(models.image_vae)]
    _refused(
        capsys,
        _run(
            source, output, models.image_vae, models, *flags, "--tokenizer", str(models.tokenizer)
        ),
        "None",
    )
    flags = ["--tokenizer", str(models.image_vae)]
    _refused(
        capsys,
        _run(source, output, models.image_vae, models, *flags),
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


# The data set alone


def test_samples_are_sorted_by_path_and_sub_folders_count(tmp_path: Path):
    for index, name in enumerate(["b.safetensors", "a/z.safetensors", "a/y.safetensors"]):
        _write(tmp_path / name, torch.full((2, 1, 4, 4), float(index)), torch.zeros(3, 5))
    (tmp_path / ".half.safetensors.1.tmp").write_bytes(b"")
    dataset = CachedDataset(str(tmp_path))
    assert [dataset.name(i) for i in range(len(dataset))] == [
        "y.safetensors",
        "z.safetensors",
        "b.safetensors",
    ]
    assert [float(dataset[i]["latents"].max()) for i in range(3)] == [2.0, 1.0, 0.0]


def test_latents_without_a_frame_axis_get_one(tmp_path: Path):
    _write(
        tmp_path / "a.safetensors",
        torch.arange(32.0).view(2, 4, 4),
        torch.zeros(3, 5, dtype=torch.bfloat16),
    )
    _write(tmp_path / "b.safetensors", torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
    dataset = CachedDataset(str(tmp_path))
    assert dataset.shapes(0) == {"latents": (2, 1, 4, 4), "prompt_embeds": (3, 5)}
    torch.testing.assert_close(dataset[0]["latents"], torch.arange(32.0).view(2, 1, 4, 4))
    assert dataset[0]["prompt_embeds"].dtype == torch.float32


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

    _write(
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
            torch.zeros(2, 1, 4, 4),
            None,
            r"bad.safetensors: no field 'prompt_embeds'; found \['latents'\]",
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
        (
            torch.zeros(2, 2, 4, 4),
            torch.zeros(3, 5),
            r"latents has shape \(2, 2, 4, 4\), need \(2, 1, 4, 4\) as in",
        ),
        (
            torch.zeros(2, 1, 4, 4),
            torch.zeros(4, 5),
            r"prompt_embeds has shape \(4, 5\), need \(3, 5\) as in",
        ),
    ],
)
def test_a_wrong_field_is_refused_before_training(tmp_path: Path, latents, prompt, message: str):
    _write(tmp_path / "a.safetensors", torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
    _write(tmp_path / "bad.safetensors", latents, prompt)
    with pytest.raises(ModelSourceError, match=message) as caught:
        CachedDataset(str(tmp_path))
    assert (
        "\n" not in str(caught.value)
        and "cache_latents" in str(caught.value)
        or "--frames" in str(caught.value)
    )


def test_missing_empty_and_damaged_folders_are_refused(tmp_path: Path):
    with pytest.raises(
        ModelSourceError, match="does not exist; need a folder of .safetensors samples"
    ):
        CachedDataset(str(tmp_path / "nowhere"))
    with pytest.raises(ModelSourceError, match="found 0 .safetensors files, need at least 1"):
        CachedDataset(str(tmp_path))
    path = tmp_path / "a.safetensors"
    _write(path, torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
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
    _write(path, torch.zeros(2, 1, 4, 4), torch.zeros(3, 5))
    dataset = CachedDataset(str(tmp_path))
    _write(path, torch.zeros(2, 1, 8, 2), torch.zeros(3, 5))
    with pytest.raises(
        ModelSourceError, match=r"latents now has shape \(2, 1, 8, 2\), need \(2, 1, 4, 4\)"
    ):
        dataset[0]
    _write(path, torch.full((2, 1, 4, 4), float("nan")), torch.zeros(3, 5))
    with pytest.raises(ModelSourceError, match="latents holds NaN or infinity"):
        dataset[0]
    path.unlink()
    with pytest.raises(ModelSourceError, match="not a readable safetensors file"):
        dataset[0]
